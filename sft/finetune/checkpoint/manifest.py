"""Checkpoints on disk: whole ones have a manifest, written last; the newest whole one is resumed.

checkpoint-40/__0_0.distcp ...     a rank's shards of weights and optimizer (torch DCP)
checkpoint-40/.metadata            where each tensor lies in them
checkpoint-40/rng_state_0.pth ...  a rank's random number generators
checkpoint-40/scheduler.pt, trainer_state.json
checkpoint-40/manifest.json        size and SHA-256 of each, step, processes, fingerprint
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finetune.errors import UserError

MANIFEST = "manifest.json"
WRITERS_RANK = re.compile(r"(?:^__|^rng_state_|_pp_rank_)(\d+)")


def step_of(folder: Path) -> int:
    return int(folder.name.split("-")[-1])


def checkpoints(run_dir: str | Path) -> list[Path]:
    """Every checkpoint folder, whole or not, the newest step first (clocks are not asked)."""
    folders = Path(run_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [folder for folder in folders if folder.name.split("-")[-1].isdecimal()]
    return sorted(numbered, key=step_of, reverse=True)


def files_of_rank(folder: Path, *, rank: int) -> list[Path]:
    """The files that this rank wrote to a checkpoint; those that name no rank are the first's."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    found = [(file, WRITERS_RANK.search(file.name)) for file in files]
    return sorted(file for file, match in found if int(match[1] if match else 0) == rank)


def manifest_entries(folder: Path, files: list[Path]) -> dict[str, dict[str, Any]]:
    """The manifest's entries: size in bytes and SHA-256 of each file, by its path in folder."""
    return {
        str(file.relative_to(folder)): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in files
    }


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> Path:
    """The last file of a checkpoint. No rename: on a mounted bucket that is a copy."""
    path, manifest = folder / MANIFEST, manifest | {"step": step_of(folder)}
    path.write_text(json.dumps(manifest | {"sha256": sha256_of(manifest)}, indent=2))
    return path


def sha256_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises OSError or ValueError if there is no whole one."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != sha256_of(manifest):
        raise ValueError(f"{folder / MANIFEST} is not what was written")
    return manifest


def check_complete(folder: Path) -> str | None:
    """Why this checkpoint is not whole, or None; sizes are compared, contents are not read."""
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
    """Why a file is not what was written, or None. Every process reads its share, all learn it."""
    state = PartialState()
    entries = sorted(read_manifest(folder)["files"].items())
    share = entries[state.process_index :: state.num_processes]
    damaged = [name for name, entry in share if sha256(folder / name) != entry["sha256"]]
    everyones = gather_object(damaged)
    return f"{everyones[0]} is not what was written (SHA-256 differs)" if everyones else None


def newest_checkpoint(run_dir: str | Path, *, skip: set[str] | None = None) -> str | None:
    """The newest whole checkpoint under run_dir but those in `skip`; names the torn ones."""
    for folder in checkpoints(run_dir):
        if str(folder) in (skip or ()):
            continue
        problem = check_complete(folder)
        if problem is None:
            return str(folder)
        print(f"checkpoint {folder} is skipped: {problem}", flush=True)
    return None


def resume_from(flag: str | None, run_dir: str) -> str | None:
    """The checkpoint --resume_from_checkpoint means: `true` is the newest whole one, a path itself.

    The first process looks, so that all resume from the same one. Raises UserError if a path is
    given that cannot be resumed from.
    """
    if flag is None or flag.lower() == "false":
        return None
    if flag.lower() != "true":
        problem = check_complete(Path(flag)) or check_hashes(Path(flag))
        if problem is not None:
            raise UserError(f"--resume_from_checkpoint {flag}: {problem}")
        return flag
    state, damaged = PartialState(), set[str]()
    while True:
        found = newest_checkpoint(run_dir, skip=damaged) if state.is_main_process else None
        checkpoint = broadcast_object_list([found])[0]
        damage = check_hashes(Path(checkpoint)) if checkpoint else None
        if damage is None:
            return checkpoint
        state.print(f"checkpoint {checkpoint} is skipped: {damage}", flush=True)
        damaged.add(checkpoint)


def prune(newest: Path, *, keep: int | None) -> None:
    """Of the checkpoints up to `newest`, which is durable, leave the newest `keep` whole ones.

    The manifest goes first: a deletion that is interrupted leaves a torn checkpoint. Those of later
    steps are of a launch that went further, or damaged; they do not count and are written again.
    """
    if keep is None:
        return
    folders = [path for path in checkpoints(newest.parent) if step_of(path) <= step_of(newest)]
    whole = [folder for folder in folders if check_complete(folder) is None]
    for folder in folders:
        if folder != newest and folder not in whole[: max(keep, 1)]:
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
