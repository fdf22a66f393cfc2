"""Which folders are checkpoints, and which of those are complete."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.checkpoint.manifest import (
    MANIFEST,
    check_complete,
    check_hashes,
    checkpoints,
    complete_checkpoints,
    files_of_rank,
    newest_checkpoint,
)
from helpers.checkpoints import begin_checkpoint, flip_a_bit, make_checkpoint, sign


def test_a_rank_lists_the_files_that_it_wrote(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    names = [[file.name for file in files_of_rank(folder, rank=rank)] for rank in range(2)]
    assert names == [
        [".metadata", "__0_0.distcp", "rng_state_0.pth", "scheduler.pt", "trainer_state.json"],
        ["__1_0.distcp", "rng_state_1.pth"],
    ]


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    for age, step in enumerate((9, 100, 20)):
        folder = make_checkpoint(tmp_path, step)
        for path in (*folder.iterdir(), folder):  # a clock that runs backwards
            os.utime(path, (age * 1000, age * 1000))
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_of_two_checkpoints_of_one_step_that_of_the_newer_launch_is_the_newest(
    tmp_path: Path,
) -> None:
    """An older one's may have become complete after all."""
    for name in ("checkpoint-4.0009", "checkpoint-4.10000", "checkpoint-4", "checkpoint-3.0011"):
        folder = begin_checkpoint(tmp_path, int(name[11]))
        sign(folder.rename(tmp_path / name))
    found = [folder.name for folder in complete_checkpoints(tmp_path)]
    assert found == ["checkpoint-4.10000", "checkpoint-4.0009", "checkpoint-4", "checkpoint-3.0011"]


def test_only_a_real_folder_with_the_name_of_a_step_is_a_checkpoint(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path, 4)
    names = (
        "backup-4",
        "4.2",
        "4.0002.bak",
        "04",
        "4-old",
        "4 ",
        "+4",
        "1_0",
        "\N{ARABIC-INDIC DIGIT FOUR}",
        "",
        "-4",
    )
    for name in names:
        (tmp_path / f"checkpoint-{name}").mkdir()
    (tmp_path / "checkpoint-5").symlink_to(made)
    (tmp_path / "checkpoint-6").symlink_to("nowhere")
    (tmp_path / "checkpoint-7").write_text("a file")
    assert checkpoints(tmp_path) == [made]
    assert list(complete_checkpoints(tmp_path)) == [made]
    assert check_complete(tmp_path / "checkpoint-5") == "it is not a folder"


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the manifest and make its hash of itself right again. None removes an entry."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    manifest = {name: value for name, value in manifest.items() if value is not None}
    manifest.pop("sha256", None)
    text = json.dumps(manifest, sort_keys=True)
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


ENTRY = {"size": 1, "sha256": "x"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"step": 3}, "is of step 3: was the folder renamed or copied?"),
        ({"launch": 2}, "of launch 2: was the folder renamed or copied?"),
        ({"step": None}, "is of step None"),
        ({"files": None}, "does not list its files"),
        ({"files": ["__0_0.distcp"]}, "does not list its files"),
        ({"files": {"__0_0.distcp": 7}}, "does not say what '__0_0.distcp' was"),
        ({"files": {"/etc/passwd": ENTRY}}, "lists '/etc/passwd', which is not in the checkpoint"),
        ({"files": {"../x": ENTRY}}, "lists '../x', which is not in the checkpoint"),
        ({"format": 2}, "is of format 2, and this version of the code reads format 1"),
        ({"fingerprint": [1]}, "the fingerprint in its manifest.json is no object"),
    ],
)
def test_a_manifest_that_cannot_be_of_this_folder_is_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path, 4)
    rewrite(folder, **changes)
    assert reason in str(check_complete(folder))


def test_a_manifest_of_before_formats_were_counted_is_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 4)
    rewrite(folder, format=None)
    assert check_complete(folder) is None


def test_a_manifest_of_before_it_had_a_hash_of_itself_is_refused_by_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 4)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"], manifest["format"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "it is of a version too old to be read" in str(check_complete(folder))


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "7", "[" * 100_000, '{"files": {'])
def test_garbage_for_a_manifest_is_refused(content: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 4)
    (folder / MANIFEST).write_text(content)
    assert "not what was written" in str(check_complete(folder))


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "it has no manifest.json"),
        (lambda folder: os.truncate(folder / MANIFEST, 100), "its manifest.json is torn"),
        (lambda folder: flip_a_bit(folder / MANIFEST), "its manifest.json is torn"),
        (lambda folder: make_folder(folder / MANIFEST), "its manifest.json cannot be read"),
        (lambda folder: make_dangling(folder / MANIFEST), "its manifest.json is a link that leads"),
        (lambda folder: (folder / "__1_0.distcp").unlink(), "__1_0.distcp is missing"),
        (lambda folder: make_folder(folder / "__1_0.distcp"), "__1_0.distcp is not a file"),
        (lambda folder: make_dangling(folder / "__1_0.distcp"), "__1_0.distcp is missing"),
        (lambda folder: os.truncate(folder / ".metadata", 9), ".metadata has 9 bytes, not"),
        (lambda folder: flip_a_bit(folder / "__0_0.distcp"), "__0_0.distcp is not what was"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 4)
    assert check_complete(folder) is None and check_hashes(folder) is None
    damage(folder)
    assert str(check_complete(folder) or check_hashes(folder)).startswith(reason)


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


def test_without_a_folder_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "missing") is None
