"""Checkpoints on disk: which ones are complete, which one is resumed, which ones are deleted.

checkpoint-40/__0_0.distcp ...     one rank's shards of weights and optimizer (torch DCP)
checkpoint-40/.metadata            where each tensor lies in the shards
checkpoint-40/rng_state_0.pth ...  one rank's random number generators
checkpoint-40/scheduler.pt, trainer_state.json
checkpoint-40/manifest.json        size and SHA-256 of every file, step, processes, fingerprint

The manifest is written after all other files have reached the bucket. A checkpoint is complete if
its manifest is there and every file has the size that the manifest names.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finetune.errors import UserError

MANIFEST = "manifest.json"
# The rank in the names that torch DCP, Trainer and DeepSpeed give to the files of one rank.
WRITERS_RANK = re.compile(r"(?:^__|^rng_state_|_pp_rank_)(\d+)")


def step_of(folder: Path) -> int:
    """The optimizer step in the name of a checkpoint's folder."""
    return int(folder.name.split("-")[-1])


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Every checkpoint folder, complete or not, the highest step first.

    Sorted by step and not by time: the clocks of two machines may disagree.
    """
    folders = Path(run_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [folder for folder in folders if folder.name.split("-")[-1].isdecimal()]
    return sorted(numbered, key=step_of, reverse=True)


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
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
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
    """Write the manifest, with the step and a hash of itself added, and return its path."""
    manifest = manifest | {"step": step_of(folder)}
    path = folder / MANIFEST
    # Not written to another name and renamed: on a mounted bucket a rename copies the file. A
    # manifest that was cut off is found by its own hash instead.
    path.write_text(json.dumps(manifest | {"sha256": sha256_of(manifest)}, indent=2))
    return path


def sha256_of(manifest: dict[str, Any]) -> str:
    """The hash that a manifest carries of its other entries."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest, without the hash of itself.

    Raises OSError if it cannot be read, ValueError if it is not as it was written.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != sha256_of(manifest):
        raise ValueError(f"{folder / MANIFEST} is not what was written")
    return manifest


def check_complete(folder: Path) -> str | None:
    """Why this checkpoint is not complete, or None if it is.

    Only sizes are compared; check_hashes reads the contents.
    """
    try:
        manifest = read_manifest(folder)
    except OSError:
        return "it has no manifest.json: its saving, or its upload, did not come to an end"
    except ValueError:
        return "its manifest.json is torn, or not what was written"
    for name, entry in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != entry["size"]:
            return f"{name} has {size} bytes, not {entry['size']}"
    return None


def check_hashes(folder: Path) -> str | None:
    """Name the first file whose SHA-256 differs from the manifest's, or return None.

    Called by all processes: each reads a share of the files, and all return the same answer.
    """
    state = PartialState()
    entries = sorted(read_manifest(folder)["files"].items())
    share = entries[state.process_index :: state.num_processes]
    damaged = [name for name, entry in share if sha256(folder / name) != entry["sha256"]]
    everyones = gather_object(damaged)
    return f"{everyones[0]} is not what was written (SHA-256 differs)" if everyones else None


def resume_from(flag: str | None, run_dir: str) -> str | None:
    """The checkpoint that --resume_from_checkpoint asks for: a path, or `true` for the newest
    complete one in run_dir whose hashes are right. None: start from step 0.

    Called by all processes. Raises UserError if a path is given that cannot be resumed from.
    """
    if flag is None or flag.lower() == "false":
        return None
    if flag.lower() != "true":
        problem = check_complete(Path(flag)) or check_hashes(Path(flag))
        if problem is not None:
            raise UserError(f"--resume_from_checkpoint {flag}: {problem}")
        return flag
    state = PartialState()
    candidates = complete_checkpoints(run_dir, on_skip=print_skipped)
    while True:
        # Only the first process looks: nodes may see a bucket's files at different times, and all
        # must resume from the same checkpoint.
        found = next(candidates, None) if state.is_main_process else None
        (checkpoint,) = broadcast_object_list([found])
        damage = check_hashes(checkpoint) if checkpoint else None
        if damage is None:
            return str(checkpoint) if checkpoint else None
        if state.is_main_process:
            print_skipped(checkpoint, damage)


def prune(newest: Path, *, keep: int | None) -> None:
    """Delete checkpoints older than `newest`, which is complete and in the bucket, except the
    `keep` newest complete ones (`newest` included). None keeps all; at least one is kept.

    Checkpoints of later steps are left alone and not counted: they come from a launch that went
    further, or are damaged, and this launch will write those steps again.
    """
    if keep is None:
        return
    complete = [
        folder
        for folder in complete_checkpoints(newest.parent)
        if step_of(folder) <= step_of(newest)
    ]
    kept = {newest, *complete[: max(keep, 1)]}
    for folder in checkpoints(newest.parent):
        if step_of(folder) <= step_of(newest) and folder not in kept:
            # The manifest first: if the deletion is interrupted, what is left is not complete.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
