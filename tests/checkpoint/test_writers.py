"""The files by which launches are ordered."""

from pathlib import Path

import pytest

from finetune.checkpoint.fingerprint import RunRecord
from finetune.checkpoint.history import conversation_date
from finetune.checkpoint.writers import (
    Writer,
    check_newest_writer,
    file_of,
    new_writer,
    newest_writer,
    write_writer,
)
from finetune.errors import UserError
from helpers.checkpoints import FINGERPRINT
from helpers.ruins import RUINS

RECORD = RunRecord.from_json(FINGERPRINT, file=Path("manifest.json"))


def claim(run_dir: Path, number: int, **changes: object) -> Writer:
    writer = new_writer(number, RECORD.identity() | changes)
    write_writer(writer, run_dir)
    return writer


def test_the_highest_number_is_the_newest_launch(tmp_path: Path) -> None:
    assert newest_writer(tmp_path) is None
    claim(tmp_path, 2)
    newest = claim(tmp_path, 10)
    claim(tmp_path, 9)
    (tmp_path / "writers/notes.json").write_text("{}")
    found = newest_writer(tmp_path)
    assert found == newest and found.host == newest.host and found.fingerprint == RECORD.identity()


def test_of_two_launches_with_one_number_one_is_the_newer(tmp_path: Path) -> None:
    writers = [claim(tmp_path, 1) for _ in range(2)]
    assert newest_writer(tmp_path) == max(writers, key=lambda writer: writer.id)


@pytest.mark.parametrize("ruin", RUINS)
def test_a_damaged_file_still_says_that_there_is_a_launch(ruin: str, tmp_path: Path) -> None:
    newest = claim(tmp_path, 2)
    older = claim(tmp_path, 1)
    RUINS[ruin](file_of(newest, tmp_path))
    assert newest_writer(tmp_path) == (older if ruin == "removed" else newest)
    check_newest_writer(tmp_path, RECORD)
    assert conversation_date(tmp_path)


def test_a_launch_of_other_settings_is_named_with_every_difference(tmp_path: Path) -> None:
    claim(tmp_path, 1, seed=1)
    file = file_of(claim(tmp_path, 2, seed=2, dataset="other"), tmp_path)
    with pytest.raises(UserError) as stopped:
        check_newest_writer(tmp_path, RECORD)
    message = str(stopped.value)
    assert str(file) in message and "(dataset other -> d; seed 2 -> 0)" in message
    assert "RUN_NAME" in message and "--ignore_fingerprint true" in message
    claim(tmp_path, 3)
    check_newest_writer(tmp_path, RECORD)


def test_a_launch_without_a_checkpoint_hands_its_date_on(tmp_path: Path) -> None:
    claim(tmp_path, 1, conversation_start_date="2001-02-03")
    assert conversation_date(tmp_path) == "2001-02-03"
