"""Which checkpoint a launch resumes from, and when it refuses to start anew."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.checkpoint.manifest import MANIFEST
from finetune.checkpoint.resume import find_checkpoint, resume_from
from finetune.errors import UserError
from helpers.checkpoints import (
    FINGERPRINT,
    begin_checkpoint,
    flip_a_bit,
    make_checkpoint,
    sign,
)

LAUNCH = {
    "wandb_run_id": None,
    "from_step": 0,
    "step": 5,
    "seconds": 5.0,
    "saving_seconds": 0.1,
    "started": 1.8e9,
    "updated": 1.8e9,
}


def test_the_newest_checkpoint_is_resumed(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        make_checkpoint(tmp_path, step)
    newest = tmp_path / "checkpoint-100"
    assert resume_from("true", tmp_path) == find_checkpoint("True", tmp_path) == newest
    first = tmp_path / "checkpoint-9"
    assert resume_from(str(first), tmp_path) == find_checkpoint(str(first), tmp_path) == first


@pytest.mark.parametrize("flag", ["true", "false", None])
def test_a_run_begins_at_step_0_where_nothing_is(flag: str | None, tmp_path: Path) -> None:
    assert resume_from(flag, tmp_path / "missing") is None
    assert find_checkpoint(flag, tmp_path) is None


@pytest.mark.parametrize("flag", ["true", "false", None])
def test_a_run_killed_in_its_first_save_begins_again(flag: str | None, tmp_path: Path) -> None:
    begin_checkpoint(tmp_path, 1)
    (tmp_path / "checkpoint-2").mkdir()
    assert resume_from(flag, tmp_path) is None


@pytest.mark.parametrize("written", [0, 100])
def test_a_kill_while_the_only_manifest_is_written_leaves_an_unfinished_save(
    written: int, tmp_path: Path
) -> None:
    """The kernel kills the process when it has written so many bytes of the file."""
    folder = begin_checkpoint(tmp_path, 1)

    def write_until_killed() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (written, written))
        sign(folder, fingerprint=FINGERPRINT)

    process = multiprocessing.get_context("fork").Process(target=write_until_killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGXFSZ
    assert not (folder / MANIFEST).exists()
    assert resume_from("true", tmp_path) is None


def resigned(name: str, content: bytes) -> Callable[[Path], None]:
    """Damage under a manifest that vouches for it."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)
        sign(folder, fingerprint=FINGERPRINT)

    return damage


DAMAGES = [
    (lambda folder: os.truncate(folder / MANIFEST, 0), "its manifest.json is torn"),
    (lambda folder: (folder / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
    (lambda folder: flip_a_bit(folder / "__0_0.distcp"), "__0_0.distcp is not what was written"),
    (lambda folder: (folder / MANIFEST).write_text('{"files": {}, "step": 2}'), "too old to be"),
    (resigned("trainer_state.json", b"{"), "trainer_state.json cannot be loaded"),
    (resigned(".metadata", b""), ".metadata cannot be loaded"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_named(
    damage: Callable[[Path], None],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, bad = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    damage(bad)
    assert resume_from("true", tmp_path) == good
    printed = capsys.readouterr().out
    assert f"checkpoint {bad} is skipped: " in printed and reason in printed
    with pytest.raises(UserError, match=f"--resume_from_checkpoint {bad}: .*{reason}"):
        resume_from(str(bad), tmp_path)


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(
    damage: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    folders = [make_checkpoint(tmp_path, step) for step in (1, 2)]
    for folder in folders:
        damage(folder)
    with pytest.raises(UserError) as stopped:
        resume_from("true", tmp_path)
    message = str(stopped.value)
    assert "can be used; to start anew, take another RUN_NAME" in message
    assert message.count(reason) >= 1
    assert "checkpoint-2: " in message and "checkpoint-1: " in message
    assert all(folder.exists() for folder in folders)


def test_another_programs_checkpoint_is_not_the_beginning_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500/optimizer.pt").write_text("of transformers' Trainer")
    with pytest.raises(UserError, match="checkpoint-500: it has no manifest.json"):
        resume_from("true", tmp_path)


def save_launch(run_dir: Path, **changes: Any) -> None:
    (run_dir / "launches").mkdir(exist_ok=True)
    (run_dir / "launches/0001.json").write_text(json.dumps(LAUNCH | changes))


def test_a_run_whose_complete_checkpoint_has_gone_does_not_begin_again(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 4)
    save_launch(tmp_path, complete=4)
    assert resume_from("true", tmp_path) == folder
    (folder / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"launches/ says that checkpoint-4 was complete"):
        resume_from("true", tmp_path)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=r"launches/ says that checkpoint-4 was complete"):
        resume_from("true", tmp_path)
    save_launch(tmp_path, complete=None)
    assert resume_from("true", tmp_path) is None


@pytest.mark.parametrize("flag", ["true", "false", None])
def test_a_result_without_checkpoints_is_not_written_over(flag: str | None, tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    assert resume_from(flag, tmp_path) is None  # of a run that was killed while it wrote it
    (tmp_path / "final/summary.json").write_text("{}")
    with pytest.raises(UserError, match="take another RUN_NAME, or delete this folder"):
        resume_from(flag, tmp_path)


@pytest.mark.parametrize("flag", ["false", "False", None])
def test_beginning_at_step_0_never_writes_over_checkpoints(
    flag: str | None, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path, 4)
    damaged = make_checkpoint(tmp_path, 2)
    os.truncate(damaged / MANIFEST, 10)
    for find in (find_checkpoint, resume_from):
        with pytest.raises(UserError, match="holds checkpoint-4, checkpoint-2; .* begin at step 0"):
            find(flag, tmp_path)


@pytest.mark.parametrize("name", ["final", "launches"])
@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("/tmp")])
def test_something_else_where_the_run_keeps_a_folder_is_named(
    name: str, make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / name)
    for find in (find_checkpoint, resume_from):
        with pytest.raises(UserError, match=f"{name} is not a folder"):
            find("true", tmp_path)


@pytest.mark.parametrize("name", ["copy-of-4", "checkpoint-5"])
def test_a_renamed_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 4)
    renamed = folder.rename(tmp_path / name)
    with pytest.raises(UserError, match=f"--resume_from_checkpoint {renamed}: "):
        resume_from(str(renamed), tmp_path)
