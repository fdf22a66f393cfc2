"""The base model that a run was trained from, also after it has moved to another folder."""

from pathlib import Path

from finetune.checkpoint.fingerprint import RunRecord, folder_hash, model_revision
from finetune.errors import UserError
from finetune.export.source import read_names
from finetune.model.weights import BaseWeights

COMMIT_LENGTH = 40  # characters; the revision of a local folder is a shorter hash of its files


def open_base(record: RunRecord, *, moved_to: str | None = None) -> BaseWeights:
    """Open the base at the very revision that was trained.

    moved_to: a hub name or a folder, if it is not where the record says. Raises UserError if it is
    not there, or is another model.
    """
    on_hub = is_commit(record.model_revision)
    model_id = moved_to or record.model
    if Path(model_id).is_dir():
        base = BaseWeights(model_id)
    elif on_hub or moved_to is not None:
        base = BaseWeights(model_id, revision=record.model_revision if on_hub else "main")
    else:
        raise UserError(f"the base model {record.model} is not there: say where it is with --model")
    check_same_base(record, base)
    read_names(sorted(set(base.files.values())))  # refuses files that are cut off
    return base


def check_same_base(record: RunRecord, base: BaseWeights) -> None:
    """Raise UserError if this is another model than the one that was trained, as far as is known.

    A model of the hub is known by its commit. A folder has none, unless it is in the hub's cache,
    and is then not compared. A folder that was trained is known by its hash, and so is a copy of
    it, on the hub too.
    """
    found = model_revision(base.model_id, revision=base.revision)
    if is_commit(record.model_revision):
        is_known = is_commit(found)
    else:
        is_known, found = True, folder_hash(base.folder)
    if is_known and found != record.model_revision:
        raise UserError(
            f"{base.model_id} is not the model that was trained: its revision is {found}, "
            f"not {record.model_revision}; give --model that one or a copy of it"
        )


def is_commit(revision: str) -> bool:
    """Whether this revision of a model is a commit on the hub, and no hash of a folder's files."""
    return len(revision) == COMMIT_LENGTH
