"""Which checkpoint a run resumes from, and which are deleted."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.checkpoint.manifest import (
    MANIFEST,
    check_complete,
    check_hashes,
    complete_checkpoints,
    files_of_rank,
    manifest_entries,
    newest_checkpoint,
    prune,
    resume_from,
    write_manifest,
)
from finetune.errors import UserError


def make_checkpoint(run_dir: Path, step: int) -> Path:
    folder = run_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp", "rng_state_1.pth", "scheduler.pt"):
        (folder / name).write_bytes(os.urandom(1000))
    files = [*files_of_rank(folder, rank=0), *files_of_rank(folder, rank=1)]
    write_manifest(folder, {"files": manifest_entries(folder, files), "fingerprint": {}})
    return folder


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[500] ^= 4
    file.write_bytes(content)


def test_a_rank_lists_the_files_that_it_wrote(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    names = [[file.name for file in files_of_rank(folder, rank=rank)] for rank in range(2)]
    assert names == [
        [".metadata", "__0_0.distcp", "scheduler.pt"],
        ["__1_0.distcp", "rng_state_1.pth"],
    ]


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for age, step in enumerate((9, 100, 20)):
        folder = make_checkpoint(tmp_path, step)
        for path in (*folder.iterdir(), folder):  # a clock that runs backwards
            os.utime(path, (age * 1000, age * 1000))
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert resume_from("true", str(tmp_path)) == str(tmp_path / "checkpoint-100")
    assert resume_from(None, str(tmp_path)) is None
    assert resume_from("false", str(tmp_path)) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "it has no manifest.json"),
        (lambda folder: os.truncate(folder / MANIFEST, 100), "its manifest.json is torn"),
        (lambda folder: flip_a_bit(folder / MANIFEST), "its manifest.json is torn"),
        (lambda folder: (folder / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
        (lambda folder: os.truncate(folder / ".metadata", 999), ".metadata has 999 bytes"),
        (lambda folder: flip_a_bit(folder / "__0_0.distcp"), "__0_0.distcp is not what was"),
    ],
    ids=["no manifest", "torn", "manifest's bit flipped", "missing", "truncated", "bit flipped"],
)
def test_damaged_checkpoints_are_skipped_and_named(
    damage: Callable[[Path], None],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, bad = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    (tmp_path / "checkpoint-old").mkdir()  # a copy that a user made: it has no step
    assert check_complete(bad) is None and check_hashes(bad) is None
    damage(bad)
    assert resume_from("true", str(tmp_path)) == str(good)
    assert f"checkpoint {bad} is skipped: {reason}" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"--resume_from_checkpoint {bad}: {reason}"):
        resume_from(str(bad), str(tmp_path))


def test_a_torn_manifest_is_skipped_by_all_who_ask_for_complete_checkpoints(
    tmp_path: Path,
) -> None:
    folders = [make_checkpoint(tmp_path, step) for step in range(1, 5)]
    os.truncate(folders[3] / MANIFEST, 100)
    os.truncate(folders[1] / MANIFEST, 100)
    skipped: list[str] = []
    complete = list(
        complete_checkpoints(tmp_path, on_skip=lambda folder, _: skipped.append(folder.name))
    )
    assert complete == [folders[2], folders[0]]
    assert skipped == ["checkpoint-4", "checkpoint-2"]
    assert newest_checkpoint(tmp_path) == folders[2]


def test_without_a_folder_there_is_nothing_to_resume(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") is None
    assert resume_from("true", str(tmp_path / "missing")) is None


def test_the_newest_complete_checkpoint_is_never_deleted(tmp_path: Path) -> None:
    folders = {step: make_checkpoint(tmp_path, step) for step in range(1, 8)}
    for step in (3, 5, 6):
        (folders[step] / MANIFEST).unlink()
    prune(folders[4], keep=None)
    assert len(list(tmp_path.iterdir())) == 7
    prune(folders[4], keep=2)  # 7 may be damaged: the run has resumed from one before it
    left = {folder.name for folder in tmp_path.iterdir()}
    assert left == {f"checkpoint-{step}" for step in (2, 4, 5, 6, 7)}
    prune(folders[4], keep=0)
    left = {folder.name for folder in tmp_path.iterdir()}
    assert left == {f"checkpoint-{step}" for step in (4, 5, 6, 7)}
