"""What the files of a checkpoint hold, read as data: nothing in them is executed.

torch DCP's .metadata is a pickle, and torch 2.13's own reader would call whatever it names; so
would its planner for the values that are not tensors. Here both are read with a list of what may
be named. Sizes and hashes (manifest.py) say that a file is as it was written, not who wrote it.
"""

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import ReadItem
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from finetune.checkpoint.manifest import step_of
from finetune.errors import UserError

METADATA = ".metadata"
TRAINER_STATE = "trainer_state.json"
SCHEDULER = "scheduler.pt"
# What DCP's metadata is made of. dtypes (torch.float32, ...) are allowed beside these.
DCP_NAMES = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # written by Python 3.13
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "Metadata"),
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
    ("torch.distributed.checkpoint.metadata", "StorageMeta"),
    ("torch.distributed.checkpoint.metadata", "TensorProperties"),
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.serialization", "_get_layout"),
}


class MetadataUnpickler(pickle.Unpickler):
    """Reads DCP's metadata. Raises UnpicklingError if the file names anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return member
        if (module, name) not in DCP_NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is none of DCP's")
        # Python 3.11 and 3.12 do not have pathlib._local.
        return super().find_class(module.removesuffix("._local"), name)


def member(kind: Any, name: str) -> Any:
    """What getattr is read as: Python 3.11.0 to 3.11.3 pickle an enum's member as a call of it."""
    if kind is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"it asks for {name!r} of something that is no enum of DCP's")
    return _MEM_FORMAT_ENCODING[name]


class CheckpointReader(FileSystemReader):
    """DCP's reader for one checkpoint; it reads the metadata once, and as data."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.file = folder / METADATA
        self.metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises UserError, naming the file, if it is not what DCP writes."""
        if self.metadata is None:
            with naming(self.file), self.file.open("rb") as file:
                self.metadata = self.unpickle(file)
        self.metadata.storage_meta = self.metadata.storage_meta or StorageMeta()
        self.metadata.storage_meta.load_id = self.load_id
        return self.metadata

    def unpickle(self, file: IO[bytes]) -> Metadata:
        """Raises ValueError if it is not metadata, or names a file outside the checkpoint."""
        metadata = MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError("it is not the metadata of a checkpoint")
        for info in dict(metadata.storage_data).values():
            name = info.relative_path if isinstance(info, _StorageInfo) else None
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"it names the file {name!r}, which is not in the checkpoint")
        return metadata


class CheckpointPlanner(DefaultLoadPlanner):
    """DCP's planner, which unpickles only numbers, texts, containers and tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # torch 2.13's own passes weights_only=False.
        content = torch.load(value, weights_only=True)
        super().load_bytes(read_item, as_file(content))


def as_file(content: Any) -> io.BytesIO:
    """What torch.load reads it from."""
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


def load_tensors(
    state_dict: dict[str, Any], reader: CheckpointReader, *, no_dist: bool = False
) -> None:
    """Read a checkpoint's tensors and other values into a state dict, as dcp.load does.

    Called by all ranks, or by one with no_dist. Raises UserError if the checkpoint cannot be read,
    or does not hold what the state dict asks for.
    """
    reader.read_metadata()  # here: dcp.load would print a traceback if that failed
    try:
        dcp.load(state_dict, storage_reader=reader, planner=CheckpointPlanner(), no_dist=no_dist)
    except CheckpointException as error:
        raise UserError(f"{reader.checkpoint_id} cannot be loaded: {reason(error)}") from error


def check_contents(folder: Path) -> str | None:
    """Why this checkpoint could not be loaded though its files are as they were written, or None.

    The small files are read, and of the tensors where they lie.
    """
    small = [folder / SCHEDULER, *sorted(folder.glob("rng_state*.pth"))]
    is_deepspeed = any(folder.glob("global_step*"))  # it has its own format for the tensors
    try:
        with naming(folder / TRAINER_STATE):
            check_trainer_state(folder / TRAINER_STATE, step=step_of(folder))
        for file in small:
            if file.exists() or not is_deepspeed:
                with naming(file):
                    load_dict(file)
        if not is_deepspeed:
            CheckpointReader(folder).read_metadata()
    except UserError as error:
        return str(error).removeprefix(f"{folder}/")
    return None


def check_trainer_state(file: Path, *, step: int) -> None:
    """Raise an error of some kind if transformers could not go on from this state at this step."""
    state = TrainerState.load_from_json(str(file))
    if state.global_step != step:
        raise ValueError(f"it is of step {state.global_step!r}")
    numbers = (state.epoch, state.max_steps, state.num_input_tokens_seen, state.total_flos)
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError("a number in it is none")
    if not all(isinstance(entry, dict) for entry in state.log_history):
        raise ValueError("its log_history is not a list of objects")


def load_dict(file: Path) -> dict[str, Any]:
    """What torch.save wrote there. Raises an error of some kind if it is not a dict of data."""
    with safe_globals():
        content = torch.load(file, weights_only=True, map_location="cpu")
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}")
    return content


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Turn any error into a UserError that names the file: for loading what a checkpoint holds."""
    try:
        yield
    except Exception as error:  # another run's states make torch and numpy raise almost anything
        raise UserError(f"{file} cannot be loaded: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """One line for an error. DCP raises one CheckpointException for the errors of all ranks: the
    first of those is named.
    """
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
