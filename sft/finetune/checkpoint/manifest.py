"""Checkpoints on disk, and which of them are complete.

checkpoint-40/__0_0.distcp ...     one rank's shards of weights and optimizer (torch DCP)
checkpoint-40/.metadata            where each tensor lies in the shards
checkpoint-40/rng_state_0.pth ...  one rank's random number generators
checkpoint-40/scheduler.pt, trainer_state.json
checkpoint-40/manifest.json        size and SHA-256 of every file, step, processes, fingerprint

The manifest is written after all other files have reached the bucket. A checkpoint is complete if
its manifest is there and every file has the size that the manifest names.

A run's first launch names its folders so, and a later one adds its number: checkpoint-40.0002. No
two launches write to one folder, because a node that was cut off from a mounted bucket uploads its
cache whenever it is back, over whatever is there by then.

Only a real folder with such a name is a checkpoint: not checkpoint-backup-40, which is somebody's
copy, and not a symbolic link, which leads to what another run may own.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

MANIFEST = "manifest.json"
DRAFT = f"{MANIFEST}.new"  # what it is called until it is whole
# Of the manifest. It changes when an older version could no longer read it, or would misread it.
# Manifests of format 1 that were written before there were others do not name it.
FORMAT = 1
NO_MANIFEST = f"it has no {MANIFEST}: its saving, or its upload, did not come to an end"
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)(?:\.([0-9]{4,}))?", re.ASCII)
# The rank in the names that torch DCP, Trainer and DeepSpeed give to the files of one rank.
WRITERS_RANK = re.compile(r"(?:^__|^rng_state_|_pp_rank_)(\d+)")


class MovedCheckpoint(ValueError):
    """A manifest that is whole, and of a checkpoint with another name."""


def checkpoint_name(step: int, launch: int) -> str:
    """What the launch of this number, from 1 on, calls its checkpoint of this step."""
    return f"checkpoint-{step}" if launch == 1 else f"checkpoint-{step}.{launch:04}"


def step_and_launch(folder: Path) -> tuple[int, int]:
    """The optimizer step and the launch's number in the name of a checkpoint. Raises ValueError if
    it is none.
    """
    match = NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder.name} is not the name of a checkpoint, such as checkpoint-40")
    return int(match[1]), int(match[2] or 1)


def step_of(folder: Path) -> int:
    """The optimizer step in the name of a checkpoint. Raises ValueError if it holds none."""
    return step_and_launch(folder)[0]


def named_checkpoints(run_dir: str | Path) -> list[Path]:
    """Whatever has the name of a checkpoint, also links and files, the highest step first, and of
    one step the newest launch first.

    Sorted by these and not by time: the clocks of two machines may disagree.
    """
    found = [path for path in Path(run_dir).glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=step_and_launch, reverse=True)


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Every checkpoint, complete or not, the highest step first."""
    return [path for path in named_checkpoints(run_dir) if is_real_folder(path)]


def is_real_folder(path: Path) -> bool:
    """Whether this is a folder, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def complete_checkpoints(
    run_dir: str | Path, *, on_skip: Callable[[Path, str], None] | None = None
) -> Iterator[Path]:
    """The complete checkpoints, the highest step first; each one is checked when it is reached.

    on_skip: called with the folder and the reason for each checkpoint that is not complete.
    """
    for folder in checkpoints(run_dir):
        problem = check_complete(folder)
        if problem is None:
            yield folder
        elif on_skip is not None:
            on_skip(folder, problem)


def newest_checkpoint(
    run_dir: str | Path, *, on_skip: Callable[[Path, str], None] | None = None
) -> Path | None:
    """The complete checkpoint of the highest step, or None. on_skip: see complete_checkpoints."""
    return next(complete_checkpoints(run_dir, on_skip=on_skip), None)


def print_skipped(folder: Path, problem: str) -> None:
    """Tell the user that a checkpoint is not used, and why."""
    print(f"checkpoint {folder} is skipped: {problem}", flush=True)


def files_of_rank(folder: Path, *, rank: int) -> list[Path]:
    """The files of a checkpoint that this rank wrote. Files without a rank in their name are
    written by rank 0.
    """
    names = (MANIFEST, DRAFT)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in names]
    found = [(file, WRITERS_RANK.search(file.name)) for file in files]
    return sorted(file for file, match in found if int(match[1] if match else 0) == rank)


def manifest_entries(folder: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of each file; the keys are the paths relative to the folder."""
    return {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in files
    }


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> Path:
    """Write the manifest, with format, step, the launch's number and a hash of itself added, and
    return its path.
    """
    step, launch = step_and_launch(folder)
    manifest = manifest | {"format": FORMAT, "step": step, "launch": launch}
    path = folder / MANIFEST
    # Under another name at first, so that a kill leaves the whole manifest or none: half of one is
    # then damage, and not a save that did not come to its end. On a mounted bucket this renames the
    # file in rclone's cache, which uploads it five seconds later.
    draft = folder / DRAFT
    with draft.open("w") as file:
        file.write(json.dumps(manifest | {"sha256": sha256_of(manifest)}, indent=2))
        file.flush()
        os.fsync(file.fileno())  # a power cut could leave the new name without the content
    draft.replace(path)
    return path


def sha256_of(manifest: dict[str, Any]) -> str:
    """The hash that a manifest carries of its other entries."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest, without the hash of itself.

    Raises OSError if it cannot be read, ValueError, saying why, if it is not as it was written,
    MovedCheckpoint if it is not of this folder.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError("its manifest.json is torn, or not what was written") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"its {MANIFEST} is not what was written")
    version = manifest.get("format", FORMAT)
    if version != FORMAT:
        raise ValueError(
            f"its {MANIFEST} is of format {version!r}, and this version of the code reads "
            f"format {FORMAT}"
        )
    if "sha256" not in manifest and "files" in manifest:
        raise ValueError(
            f"its {MANIFEST} has no hash of itself: it is of a version too old to be read"
        )
    if manifest.pop("sha256", None) != sha256_of(manifest):
        raise ValueError("its manifest.json is torn, or not what was written")
    check_entries(manifest, folder)
    return manifest


def check_entries(manifest: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if the manifest lacks what is needed to compare the folder with it."""
    # Until launches had numbers of their own, no folder's name held one.
    step, launch = manifest.get("step"), manifest.get("launch", 1)
    if (step, launch) != step_and_launch(folder):
        of_launch = "" if launch == 1 else f" of launch {launch!r}"
        raise MovedCheckpoint(
            f"its {MANIFEST} is of step {step!r}{of_launch}: was the folder renamed or copied?"
        )
    if not isinstance(manifest.get("fingerprint", {}), dict):
        raise ValueError(f"the fingerprint in its {MANIFEST} is no object")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise ValueError(f"its {MANIFEST} does not list its files")
    for name, entry in files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"its {MANIFEST} lists {name!r}, which is not in the checkpoint")
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise ValueError(f"its {MANIFEST} does not say what {name!r} was when it was written")


def check_complete(folder: Path) -> str | None:
    """Why this checkpoint is not complete, or None if it is.

    Only sizes are compared; check_hashes reads the contents.
    """
    if not is_real_folder(folder):
        return "it is not a folder"
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        is_link = (folder / MANIFEST).is_symlink()
        return f"its {MANIFEST} is a link that leads nowhere" if is_link else NO_MANIFEST
    except OSError as error:
        return f"its {MANIFEST} cannot be read ({error.strerror})"
    except ValueError as error:
        return str(error)
    for name, entry in manifest["files"].items():
        try:
            found = (folder / name).stat()
        except OSError:
            return f"{name} is missing"
        if not stat.S_ISREG(found.st_mode):
            return f"{name} is not a file"
        if found.st_size != entry["size"]:
            return f"{name} has {found.st_size} bytes, not {entry['size']}"
    return None


def check_hashes(folder: Path) -> str | None:
    """Name the first file whose SHA-256 differs from the manifest's, or return None.

    Called by all processes: each reads a share of the files, and all return the same answer.
    """
    state = PartialState()
    entries = sorted(read_manifest(folder)["files"].items())
    share = entries[state.process_index :: state.num_processes]
    problems = [hash_problem(folder / name, name, entry["sha256"]) for name, entry in share]
    everyones = [problem for problem in gather_object(problems) if problem is not None]
    return everyones[0] if everyones else None


def hash_problem(file: Path, name: str, expected: str) -> str | None:
    """Why the file is not what was written, or None."""
    try:
        is_same = sha256(file) == expected
    except OSError as error:  # not raised: the other processes wait for this one's answer
        return f"{name} cannot be read ({error.strerror})"
    return None if is_same else f"{name} is not what was written (SHA-256 differs)"
