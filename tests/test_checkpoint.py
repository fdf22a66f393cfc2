"""Which checkpoint a run resumes from."""

import json
from pathlib import Path

import pytest

from checkpoint import newest_checkpoint, resume_from
from errors import UserError


def make_checkpoint(run_dir: Path, step: int) -> Path:
    folder = run_dir / f"checkpoint-{step}"
    (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
    (folder / "pytorch_model_fsdp_0/.metadata").touch()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def test_the_newest_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        make_checkpoint(tmp_path, step)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    assert resume_from("true", str(tmp_path)) == str(tmp_path / "checkpoint-100")
    assert resume_from(None, str(tmp_path)) is None
    assert resume_from("false", str(tmp_path)) is None


def test_torn_checkpoints_are_skipped_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = make_checkpoint(tmp_path, 1)
    (make_checkpoint(tmp_path, 2) / "pytorch_model_fsdp_0/.metadata").unlink()
    (make_checkpoint(tmp_path, 3) / "trainer_state.json").write_text('{"global_')
    (make_checkpoint(tmp_path, 4) / "trainer_state.json").unlink()
    assert newest_checkpoint(tmp_path) == str(good)
    said = capsys.readouterr().out
    assert all(f"checkpoint-{step} is skipped" in said for step in (2, 3, 4))


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") is None
    with pytest.raises(UserError, match=r"checkpoint-7: trainer_state\.json is missing"):
        resume_from(str(tmp_path / "checkpoint-7"), str(tmp_path))
