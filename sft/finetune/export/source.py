"""What a run has trained, one tensor at a time: of its final artifact, else of its newest whole
checkpoint, also while it trains on. Nothing of the run is written to.
"""

import json
import re
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from trl import ModelConfig

from finetune.checkpoint.artifact import ARTIFACT, SUMMARY, is_finished
from finetune.checkpoint.fingerprint import RunRecord, read_record
from finetune.checkpoint.manifest import (
    check_hashes,
    complete_checkpoints,
    newest_checkpoint,
    print_skipped,
    read_manifest,
)
from finetune.errors import UserError
from finetune.model.weights import BaseWeights

ADAPTER = "adapter_model.safetensors"
PREFIX = "model."  # of weights in a checkpoint, beside `optimizer.`


class RunWeights:
    """A run's tensors. An adapter's are named as in PEFT's files and kept in their own dtype, all
    weights as GptOssForCausalLM names them and in bf16.

    record: what the run trained; origin: `final` or `checkpoint-N`.
    """

    def __init__(self, folder: Path, *, step: int | None, record: RunRecord) -> None:
        self.folder, self.step, self.record = folder, step, record
        self.origin = folder.name
        self.is_adapter = record.use_peft
        self.shapes: dict[str, torch.Size] = {}

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Part of a tensor along its first dimension."""
        raise NotImplementedError

    def lora_config(self) -> LoraConfig | ModelConfig:
        """The adapter's configuration, or the flags that it comes from."""
        raise NotImplementedError


class FinalArtifact(RunWeights):
    """The safetensors that train.py leaves. Raises UserError if a file of them is not whole."""

    def __init__(self, folder: Path, *, run_dir: Path) -> None:
        try:
            summary = json.loads((folder / SUMMARY).read_text())
        except ValueError as error:
            raise UserError(
                f"{folder / SUMMARY} is torn: is the run writing it just now?"
            ) from error
        values = summary.get("run")
        if values:
            record = RunRecord.from_json(values, file=folder / SUMMARY)
        else:
            record = newest_record(run_dir)
        super().__init__(folder, step=summary.get("steps"), record=record)
        if self.is_adapter:
            self.files = read_names([folder / ADAPTER])
        else:
            self.files = BaseWeights(str(folder)).files
            read_names(sorted(set(self.files.values())))
        for name, file in self.files.items():
            with safe_open(file, "pt") as tensors:
                self.shapes[name] = torch.Size(tensors.get_slice(name).get_shape())

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        with safe_open(self.files[name], "pt") as tensors:
            rows = tensors.get_slice(name)[start:stop]
        return rows if self.is_adapter else rows.to(torch.bfloat16)

    def lora_config(self) -> LoraConfig:
        return LoraConfig.from_pretrained(self.folder)


class SavedCheckpoint(RunWeights):
    """A checkpoint's weights (torch DCP), whatever number of ranks wrote them."""

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        super().__init__(folder, step=manifest["step"], record=read_record(folder))
        if not (folder / ".metadata").exists():
            raise UserError(f"{folder} is DeepSpeed's: export once the run has finished")
        self.reader = FileSystemReader(folder)
        stored = self.reader.read_metadata().state_dict_metadata
        self.stored: dict[str, str] = {}
        for key, entry in stored.items():
            if key.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata):
                key = key.removeprefix(PREFIX)
                name = re.sub(r"\.(modules_to_save\.)?default\b", "", key)
                self.stored[name], self.shapes[name] = key, entry.size
        self.last: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if self.last[0] != name:
            # Read shard by shard, each rounded as it comes: a stack of 120b in fp32 is 8.5 GB.
            dtype = torch.float32 if self.is_adapter else torch.bfloat16
            self.last = ("", torch.empty(0))
            tensor = torch.empty(self.shapes[name], dtype=dtype)
            try:
                state_dict = {"model": {self.stored[name]: tensor}}
                dcp.load(state_dict, storage_reader=self.reader, no_dist=True)
            except (CheckpointException, OSError) as error:
                raise UserError(
                    f"{self.folder} cannot be read any more: if the run goes on and has deleted "
                    "it, export again to another folder"
                ) from error
            self.last = (name, tensor)
        return self.last[1][start:stop]

    def lora_config(self) -> ModelConfig:
        return ModelConfig(use_peft=True, lora_dropout=0.0, **self.record.lora)


def newest_record(run_dir: Path) -> RunRecord:
    """For an artifact that holds none. Raises UserError if no checkpoint does."""
    newest = newest_checkpoint(run_dir)
    if newest is None:
        raise UserError(
            f"{run_dir} does not say which model was trained: its {SUMMARY} lacks it, "
            "and there is no complete checkpoint"
        )
    return read_record(newest)


def read_names(files: list[Path]) -> dict[str, Path]:
    """Every tensor and its file. Raises UserError for a file that is missing or cut off."""
    found: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is not whole: {str(error).splitlines()[0]}") from error
    return found


def find_run_weights(run_dir: Path, *, origin: str | None = None, check: bool = True) -> RunWeights:
    """The run's final artifact or else its newest whole checkpoint; the one named `origin` if it is
    still there. check: compare a checkpoint's files with their SHA-256.

    Raises UserError if there is neither, or if what there is turns out damaged.
    """
    if not run_dir.is_dir():
        raise UserError(f"there is no run in {run_dir}: give the folder that holds its checkpoints")
    artifact = run_dir if is_finished(run_dir) else run_dir / ARTIFACT
    if is_finished(artifact) and not (origin or "").startswith("checkpoint"):
        return FinalArtifact(artifact, run_dir=run_dir)
    problems: list[str] = []

    def skip(folder: Path, problem: str) -> None:
        print_skipped(folder, problem)
        problems.append(f"{folder.name}: {problem}")

    for folder in complete_checkpoints(run_dir, on_skip=skip):
        if origin in (None, folder.name):
            damage = check_hashes(folder) if check else None
            if damage is not None:
                raise UserError(f"{folder}: {damage}; delete it to export the one before")
            return SavedCheckpoint(folder)
    if origin is not None:
        raise UserError(
            f"--output holds the beginning of an export of {origin}, which the run has deleted "
            "since: give another --output"
        )
    raise UserError(
        "; ".join([f"nothing in {run_dir} is whole: no {ARTIFACT}/{SUMMARY}", *problems[:3]])
        + ("" if problems else ", no checkpoint")
    )
