"""Small checkpoints made without a run, with all the files that train.py writes."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from transformers import TrainerState

from finetune.checkpoint.manifest import files_of_rank, manifest_entries, write_manifest

FINGERPRINT = {
    "model": "m",
    "model_revision": "r",
    "dataset": "d",
    "seed": 0,
    "use_peft": True,
    "conversation_start_date": "2026-01-02",
}


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """All files but the manifest, as a launch leaves them that is killed before the commit."""
    folder = run_dir / f"checkpoint-{step}"
    dcp.save({"model": {"a": torch.ones(100)}}, checkpoint_id=folder, no_dist=True)
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    for rank in range(2):
        torch.save({"cpu": torch.zeros(100)}, folder / f"rng_state_{rank}.pth")
    (folder / "__1_0.distcp").write_bytes(os.urandom(1000))
    state = TrainerState(global_step=step, max_steps=10, epoch=0.1, total_flos=1.0)
    state.save_to_json(str(folder / "trainer_state.json"))
    return folder


def make_checkpoint(run_dir: Path, step: int, **fingerprint: Any) -> Path:
    """A complete checkpoint. fingerprint: what its run has other than FINGERPRINT."""
    folder = begin_checkpoint(run_dir, step)
    sign(folder, fingerprint=FINGERPRINT | fingerprint)
    return folder


def sign(folder: Path, **manifest: Any) -> None:
    """Write a manifest that describes the files of both ranks as they are now."""
    files = [*files_of_rank(folder, rank=0), *files_of_rank(folder, rank=1)]
    write_manifest(folder, {"files": manifest_entries(folder, files)} | manifest)


def flip_a_bit(file: Path) -> None:
    """In the middle of the file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
