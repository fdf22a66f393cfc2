"""An output folder belongs to one export."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.export.record import RECORD, ExportRecord, check_same_export, read_record


def make_record() -> ExportRecord:
    return ExportRecord(format="bf16", origin="final", step=4, fingerprint={"seed": 0})


def test_an_export_goes_on_with_its_own_base_alone(tmp_path: Path) -> None:
    begun, other = (replace(make_record(), base_hash=text) for text in ("one", "other"))
    check_same_export(begun, begun, tmp_path)
    check_same_export(make_record(), other, tmp_path)  # of an earlier version, which recorded none
    with pytest.raises(UserError, match="with another base model: repeat it with the --model of"):
        check_same_export(begun, other, tmp_path)


def test_a_new_or_empty_folder_holds_no_export(tmp_path: Path) -> None:
    assert read_record(tmp_path / "new") is None
    assert read_record(tmp_path) is None


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = make_record()
    record.fidelity, record.hints = {"kl": 0.5}, ["serve bf16"]
    record.write(tmp_path, finished=True)
    assert json.loads((tmp_path / RECORD).read_text())["finished"]
    assert read_record(tmp_path) == record


def test_a_record_whose_writing_is_interrupted_is_the_one_before(tmp_path: Path) -> None:
    """The disk is full, in the place of a killed process: the file is begun and not complete."""
    part = tmp_path / f".{RECORD}.part"
    part.write_text('{"format": "bf')
    assert read_record(tmp_path) is None
    make_record().write(tmp_path, finished=False)
    part.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        make_record().write(tmp_path, finished=True)
    assert read_record(tmp_path) == make_record()


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    make_record().write(tmp_path, finished=False)
    assert not {"fidelity", "text"} & json.loads((tmp_path / RECORD).read_text()).keys()


@pytest.mark.parametrize("name", ["notes.txt", RECORD])
def test_a_folder_with_anything_else_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(UserError, match="holds something else"):
        read_record(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"format": "mxfp4"}, {"origin": "checkpoint-4"}, {"step": 5}, {"fingerprint": {"seed": 1}}],
)
def test_another_export_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    other = ExportRecord(**(vars(make_record()) | change))  # type: ignore[arg-type]
    check_same_export(make_record(), make_record(), tmp_path)
    with pytest.raises(UserError, match="holds an export as bf16 of step 4 or of another run"):
        check_same_export(make_record(), other, tmp_path)
