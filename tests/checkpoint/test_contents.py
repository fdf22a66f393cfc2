"""The files of a checkpoint are read as data: nothing in them is executed."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from finetune.checkpoint.contents import (
    METADATA,
    SCHEDULER,
    TRAINER_STATE,
    CheckpointReader,
    MetadataUnpickler,
    check_contents,
    load_tensors,
)
from finetune.errors import UserError
from helpers.paths import REPO

WRITTEN = REPO / "tests/runs/earlier_run/interrupted/checkpoint-3"


class Command:
    """What runs a command when it is unpickled: it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


@pytest.fixture(params=["checkpoint-3", "checkpoint-3.0002"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint that train.py wrote on two ranks, by the name that any launch may give it."""
    return Path(shutil.copytree(WRITTEN, tmp_path / request.param))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Exists if a command has run."""
    return tmp_path / "trace"


def saved_tensor(folder: Path, value: Any) -> Path:
    """A checkpoint of one tensor and one other value."""
    dcp.save({"a": torch.ones(2), "b": value}, checkpoint_id=folder, no_dist=True)
    return folder


def test_a_checkpoint_that_was_written_can_be_read(folder: Path) -> None:
    assert check_contents(folder) is None
    metadata = CheckpointReader(folder).read_metadata()
    assert len(metadata.state_dict_metadata) > 100


class Getattr:
    """Pickled as a call of getattr, which is how Python 3.11.2 pickles the member of an enum."""

    def __init__(self, owner: Any, name: str) -> None:
        self.arguments = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.arguments


def test_metadata_of_any_python_can_be_read_and_getattr_reaches_nothing_else() -> None:
    name = "TORCH_CHANNELS_LAST"
    written = pickle.dumps(Getattr(_MEM_FORMAT_ENCODING, name))
    assert MetadataUnpickler(io.BytesIO(written)).load() is _MEM_FORMAT_ENCODING[name]
    for owner, name in ((torch.Size, "__init__"), (_MEM_FORMAT_ENCODING, "__class__")):
        crafted = io.BytesIO(pickle.dumps(Getattr(owner, name)))
        with pytest.raises((pickle.UnpicklingError, KeyError)):
            MetadataUnpickler(crafted).load()


def test_tensors_and_other_values_are_read(tmp_path: Path) -> None:
    value = {"betas": (0.9, 0.999), "fused": True, "name": "x", "none": None}
    reader = CheckpointReader(saved_tensor(tmp_path / "checkpoint-1", value))
    state: dict[str, Any] = {"a": torch.zeros(2), "b": dict.fromkeys(value)}
    load_tensors(state, reader, no_dist=True)
    assert state["a"].tolist() == [1, 1] and state["b"] == value


def test_a_command_in_the_metadata_is_not_run(folder: Path, trace: Path) -> None:
    (folder / METADATA).write_bytes(pickle.dumps(Command(trace)))
    reason = f"{METADATA} cannot be loaded: UnpicklingError: it names posix.system"
    assert reason in str(check_contents(folder))
    with pytest.raises(UserError, match="it names posix.system, which is none of DCP's"):
        load_tensors({"model": {}}, CheckpointReader(folder), no_dist=True)
    assert not trace.exists()


def test_a_command_beside_the_tensors_is_not_run(tmp_path: Path, trace: Path) -> None:
    reader = CheckpointReader(saved_tensor(tmp_path / "checkpoint-1", Command(trace)))
    with pytest.raises(
        UserError, match="checkpoint-1 cannot be loaded: .*Weights only load failed"
    ):
        load_tensors({"a": torch.zeros(2), "b": 0}, reader, no_dist=True)
    assert not trace.exists()


@pytest.mark.parametrize("name", [SCHEDULER, "rng_state_1.pth"])
def test_a_command_in_a_small_file_is_not_run(folder: Path, trace: Path, name: str) -> None:
    torch.save({"state": Command(trace)}, folder / name)
    assert f"{name} cannot be loaded" in str(check_contents(folder))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../checkpoint-2/__0_0.distcp"])
def test_metadata_that_names_a_file_elsewhere_is_refused(folder: Path, name: str) -> None:
    metadata = CheckpointReader(folder).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = name
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    assert f"{name!r}, which is not in the checkpoint" in str(check_contents(folder))


def test_what_the_state_asks_for_and_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    reader = CheckpointReader(saved_tensor(tmp_path / "checkpoint-1", 1))
    with pytest.raises(UserError, match="checkpoint-1 cannot be loaded: .*other"):
        load_tensors({"other": torch.zeros(2)}, reader, no_dist=True)


def state(**changes: Any) -> bytes:
    """The trainer's state with some entries changed."""
    return json.dumps(json.loads((WRITTEN / TRAINER_STATE).read_text()) | changes).encode()


@pytest.mark.parametrize("name", [TRAINER_STATE, SCHEDULER, "rng_state_0.pth", METADATA])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"[" * 100_000, b"\xff\x00\x80", pickle.dumps([1])], ids=repr
)
def test_garbage_in_any_file_is_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    problem = check_contents(folder)
    assert problem is not None and problem.startswith(f"{name} cannot be loaded: ")
    assert len(problem.splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [
        state(global_step=2),
        state(global_step=None),
        state(log_history="none"),
        state(log_history=[1]),
        state(max_steps="6"),
        state(epoch=None),
        state(unknown=1),
    ],
)
def test_a_state_of_another_shape_is_refused(folder: Path, content: bytes) -> None:
    (folder / TRAINER_STATE).write_bytes(content)
    assert str(check_contents(folder)).startswith(f"{TRAINER_STATE} cannot be loaded: ")


@pytest.mark.parametrize("name", [TRAINER_STATE, SCHEDULER, "rng_state_0.pth", METADATA])
@pytest.mark.parametrize(
    "replace",
    [lambda file: file.mkdir(), lambda file: file.symlink_to("nowhere")],
    ids=["a folder", "a dangling link"],
)
def test_what_is_no_file_is_named(folder: Path, name: str, replace: Callable[[Path], None]) -> None:
    (folder / name).unlink()
    replace(folder / name)
    assert str(check_contents(folder)).startswith(f"{name} cannot be loaded: ")
