"""What a run may delete or write over: only what it has written itself."""

import re
import shutil
from pathlib import Path

import pytest

from finetune.checkpoint.manifest import MANIFEST
from finetune.checkpoint.ownership import (
    check_later_steps,
    check_not_in_the_way,
    is_of_run,
    is_unfinished,
    prune,
)
from finetune.errors import UserError
from helpers.checkpoints import FINGERPRINT, begin_checkpoint, make_checkpoint


def prune_to(newest: Path, *, keep: int | None) -> None:
    prune(newest, keep=keep, fingerprint=FINGERPRINT)


def names(run_dir: Path) -> set[str]:
    return {path.name for path in run_dir.iterdir()}


def test_the_newest_complete_checkpoint_is_never_deleted(tmp_path: Path) -> None:
    folders = {step: make_checkpoint(tmp_path, step) for step in range(1, 8)}
    for step in (3, 5, 6):
        (folders[step] / MANIFEST).unlink()
    prune_to(folders[4], keep=None)
    assert len(names(tmp_path)) == 7
    prune_to(folders[4], keep=2)  # 7 may be damaged: the run has resumed from one before it
    assert names(tmp_path) == {f"checkpoint-{step}" for step in (2, 4, 5, 6, 7)}
    prune_to(folders[4], keep=0)
    assert names(tmp_path) == {f"checkpoint-{step}" for step in (4, 5, 6, 7)}


def make_foreign(run_dir: Path) -> set[str]:
    """Put beside a run's checkpoints what is not the run's; the names."""
    elsewhere = make_checkpoint(run_dir.parent / "elsewhere", 2)
    shutil.copytree(elsewhere, run_dir / "checkpoint-backup-2")
    shutil.copytree(elsewhere, run_dir / "checkpoint-02")
    (run_dir / "checkpoint-2").symlink_to(elsewhere)
    make_checkpoint(run_dir, 3, seed=1)
    (run_dir / "checkpoint-4").mkdir()
    (run_dir / "checkpoint-4/optimizer.pt").write_text("of transformers' Trainer")
    (run_dir / "checkpoint-5").write_text("a file")
    return names(run_dir)


def test_what_the_run_has_not_written_is_not_deleted(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    foreign = make_foreign(run_dir)
    copied = ("checkpoint-0", "checkpoint-1.0003")
    for name in copied:
        shutil.copytree(make_checkpoint(run_dir, 1), run_dir / name)
    begin_checkpoint(run_dir, 6)
    newest = make_checkpoint(run_dir, 7)
    prune_to(newest, keep=1)
    assert names(run_dir) == {*foreign, *copied, "checkpoint-7"}
    assert (run_dir / "checkpoint-2/scheduler.pt").exists()


def test_checkpoints_of_others_do_not_count_as_kept_ones(tmp_path: Path) -> None:
    first = make_checkpoint(tmp_path, 1)
    make_checkpoint(tmp_path, 2, seed=1)
    prune_to(make_checkpoint(tmp_path, 3), keep=2)
    assert first.exists()


@pytest.mark.parametrize("step", [2, 3, 4, 5])
def test_what_lies_where_a_save_would_be_is_refused(tmp_path: Path, step: int) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    make_foreign(run_dir)
    with pytest.raises(UserError, match=f"checkpoint-{step} is .* move it elsewhere"):
        check_not_in_the_way(run_dir / f"checkpoint-{step}", FINGERPRINT)
    check_not_in_the_way(run_dir / "checkpoint-8", FINGERPRINT)


def test_only_steps_to_come_are_in_the_way(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1, seed=1)
    resumed = make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 3)
    check_later_steps(tmp_path, resumed=resumed, fingerprint=FINGERPRINT)
    make_checkpoint(tmp_path, 4, seed=1)
    with pytest.raises(UserError, match="checkpoint-4 is of another run or program"):
        check_later_steps(tmp_path, resumed=resumed, fingerprint=FINGERPRINT)
    with pytest.raises(UserError, match=re.escape("checkpoint-")):
        check_later_steps(tmp_path, resumed=None, fingerprint=FINGERPRINT)


def test_the_remains_of_a_save_are_the_runs(tmp_path: Path) -> None:
    folder = begin_checkpoint(tmp_path, 1)
    assert is_unfinished(folder) and is_of_run(folder, FINGERPRINT)
    (folder / MANIFEST).write_text("{")
    assert not is_unfinished(folder) and is_of_run(folder, FINGERPRINT)
    (folder / "notes.txt").write_text("mine")
    assert not is_of_run(folder, FINGERPRINT)
    (tmp_path / "checkpoint-2/global_step2").mkdir(parents=True)
    (tmp_path / "checkpoint-2/latest").write_text("of DeepSpeed")
    assert is_unfinished(tmp_path / "checkpoint-2")


def test_a_fingerprint_of_before_a_key_was_added_is_the_runs(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1, torch="2.13.0+cpu")
    assert is_of_run(folder, FINGERPRINT | {"torch": "2.13.0", "truncate": False})
