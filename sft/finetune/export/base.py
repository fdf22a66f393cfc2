"""The base model that a run was trained from, also after it has moved to another folder."""

from pathlib import Path

from finetune.checkpoint.fingerprint import RunRecord, model_revision
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
    if not Path(model_id).is_dir():
        if not on_hub and moved_to is None:
            raise UserError(
                f"the base model {record.model} is not there: say where it is with --model"
            )
        return BaseWeights(model_id, revision=record.model_revision if on_hub else "main")
    # A copy of a hub's model in a folder has no commit that could be compared.
    found = model_revision(model_id, revision="main")
    if not on_hub and found != record.model_revision:
        raise UserError(
            f"{model_id} is not the model that was trained: its revision is {found}, "
            f"not {record.model_revision}"
        )
    base = BaseWeights(model_id)
    read_names(sorted(set(base.files.values())))  # refuses files that are cut off
    return base


def is_commit(revision: str) -> bool:
    """Whether this revision of a model is a commit on the hub, and no hash of a folder's files."""
    return len(revision) == COMMIT_LENGTH
