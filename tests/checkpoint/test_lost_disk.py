"""A disk that fills up or becomes read-only during a save: one error, and what was saved stays."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator

from finetune.checkpoint.artifact import is_finished, save_artifact
from finetune.checkpoint.manifest import newest_checkpoint
from finetune.checkpoint.saver import Saver
from finetune.errors import UserError
from finetune.model.loading import load_model, load_tokenizer
from finetune.model.weights import BaseWeights
from finetune.preemption import PreemptionNotice

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The mount point of a disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> None:
    """Leave no space."""
    with pytest.raises(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def make_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


LOSSES = [(fill, "No space left on device"), (make_read_only, "Read-only file system")]


@pytest.mark.parametrize(("lose", "reason"), LOSSES)
def test_a_save_names_the_reason_and_the_checkpoint_before_is_kept(
    lose: Callable[[Path], None], reason: str, disk: Path
) -> None:
    saver = Saver(
        disk, notice=PreemptionNotice(), every_minutes=5, keep=1, manifest={"fingerprint": {}}
    )

    def write(folder: Path) -> None:
        (folder / "scheduler.pt").write_bytes(bytes(4096))

    saver.save(1, None, write)
    saver.finish()
    lose(disk)
    with pytest.raises(UserError, match=f"{reason}.* last complete checkpoint is checkpoint-1"):
        saver.save(2, None, write)
        saver.finish()
    assert newest_checkpoint(disk) == disk / "checkpoint-1"


@pytest.mark.parametrize(("lose", "reason"), LOSSES)
def test_the_final_save_names_the_reason(
    lose: Callable[[Path], None], reason: str, disk: Path, tiny_model: Path
) -> None:
    model = load_model(BaseWeights(str(tiny_model)), attn_implementation="eager", dequantize=True)
    lose(disk)
    with pytest.raises(UserError, match=f"writing the result to .*{reason}.*checkpoints are kept"):
        save_artifact(
            Accelerator(cpu=True),
            model,
            load_tokenizer(str(tiny_model)),
            artifact=disk / "final",
            summary={"steps": 4},
        )
    assert not is_finished(disk / "final")
