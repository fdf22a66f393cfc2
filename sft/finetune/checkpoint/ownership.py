"""What a run may delete or write over in its folder: only what it has written itself.

The folder is the user's, and may hold copies, links and other programs' checkpoints beside ours.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from finetune.checkpoint.fingerprint import is_same_fingerprint
from finetune.checkpoint.manifest import (
    DRAFT,
    MANIFEST,
    MovedCheckpoint,
    checkpoints,
    complete_checkpoints,
    is_real_folder,
    named_checkpoints,
    read_manifest,
    step_of,
)
from finetune.errors import UserError

# What Saver's saves consist of. A checkpoint of another program has files of other names, such as
# the optimizer.pt of transformers' Trainer.
OUR_FILES = re.compile(
    r"\.metadata|__\d+_\d+\.distcp|rng_state(_\d+)?\.pth|scheduler\.pt|trainer_state\.json|"
    + "|".join(map(re.escape, (MANIFEST, DRAFT)))
)


def is_unfinished(folder: Path) -> bool:
    """Whether this can only be what a save of ours left that did not come to its manifest."""
    has_manifest = (folder / MANIFEST).exists() or (folder / MANIFEST).is_symlink()
    return not has_manifest and has_our_files(folder)


def has_our_files(folder: Path) -> bool:
    """Whether a save of ours could have written everything in this folder."""
    if (folder / f"global_step{step_of(folder)}").is_dir():
        return True  # DeepSpeed's, which writes the model's files beside it
    return all(OUR_FILES.fullmatch(path.name) for path in folder.iterdir())


def is_of_run(path: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether the run of this fingerprint has written the checkpoint, as far as can be known."""
    if not is_real_folder(path):
        return False
    try:
        manifest = read_manifest(path)
    except MovedCheckpoint:  # somebody's copy
        return False
    except (OSError, ValueError):  # it says nothing: is it the remains of a save?
        return has_our_files(path)
    return is_same_fingerprint(manifest.get("fingerprint", {}), fingerprint, file=path / MANIFEST)


def check_not_in_the_way(path: Path, fingerprint: dict[str, Any]) -> None:
    """Raise UserError if a save at this path would write over what is not the run's."""
    if (path.exists() or path.is_symlink()) and not is_of_run(path, fingerprint):
        what = "of another run or program" if is_real_folder(path) else "a link or a file"
        raise UserError(
            f"{path} is {what}, and this run would write over it at that step: move it elsewhere, "
            "or take another RUN_NAME"
        )


def check_later_steps(
    run_dir: str | Path, *, resumed: Path | None, fingerprint: dict[str, Any]
) -> None:
    """Raise UserError if something that is not the run's has the name of a step to come."""
    first = 0 if resumed is None else step_of(resumed) + 1
    for path in named_checkpoints(run_dir):
        if step_of(path) >= first:
            check_not_in_the_way(path, fingerprint)


def prune(newest: Path, *, keep: int | None, fingerprint: dict[str, Any]) -> None:
    """Delete the run's checkpoints older than `newest`, which is complete and in the bucket, except
    the `keep` newest complete ones (`newest` included). None keeps all; at least one is kept.

    Checkpoints of later steps are left alone and not counted: they come from a launch that went
    further, or are damaged, and this launch will write those steps again.
    """
    if keep is None:
        return
    complete = [
        folder
        for folder in complete_checkpoints(newest.parent)
        if step_of(folder) <= step_of(newest) and is_of_run(folder, fingerprint)
    ]
    kept = {newest, *complete[: max(keep, 1)]}
    for folder in checkpoints(newest.parent):
        is_older = step_of(folder) <= step_of(newest)
        if is_older and folder not in kept and is_of_run(folder, fingerprint):
            # The manifest first: if the deletion is interrupted, what is left is not complete.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
