"""The weights that a run has trained, read one tensor at a time.

They come from the run's final artifact or, if there is none, from its newest complete checkpoint,
also while the run is still training. Nothing is written to the run's folder.
"""

import os
import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from trl import ModelConfig

from finetune.checkpoint.artifact import ARTIFACT
from finetune.checkpoint.contents import METADATA, CheckpointReader, load_tensors, naming
from finetune.checkpoint.fingerprint import RunRecord, read_record
from finetune.checkpoint.manifest import (
    MANIFEST,
    check_hashes,
    complete_checkpoints,
    newest_checkpoint,
    print_skipped,
    read_manifest,
    sha256,
    sha256_of,
)
from finetune.checkpoint.summary_file import REMEDY, SUMMARY, read_summary
from finetune.errors import UserError
from finetune.model.weights import CPU, BaseWeights

ADAPTER = "adapter_model.safetensors"
PREFIX = "model."  # of the weights in a checkpoint; the optimizer's states have `optimizer.`


class RunWeights(ABC):
    """A run's weights: a WeightSource with two forms, FinalArtifact and SavedCheckpoint.

    An adapter's tensors have the names of PEFT's files and keep their dtype. All weights of a model
    have the names of GptOssForCausalLM and are in bf16.

    folder: what is read; origin: its name, `final` or `checkpoint-N`; step: of the optimizer, None
    if the run did not record it; record: what was trained on what; shapes: of each tensor, by name;
    lora_file: where the adapter's configuration is from; summary: the run's summary.json, empty of
    a run that has not finished; weights_sha256: over the hashes of the weights' files, None where
    an earlier version recorded none.
    """

    lora_file: Path
    summary: dict[str, Any]
    weights_sha256: str | None

    def __init__(self, folder: Path, *, step: int | None, record: RunRecord) -> None:
        self.folder, self.step, self.record = folder, step, record
        self.origin = folder.name
        self.is_adapter = record.use_peft
        self.shapes: dict[str, torch.Size] = {}
        self.summary = {}

    def shape(self, name: str) -> torch.Size:
        return self.shapes[name]

    def is_packed(self, name: str) -> bool:
        """False: what is trained is never in MXFP4."""
        return False

    @abstractmethod
    def rows(
        self, name: str, *, start: int = 0, stop: int | None = None, device: torch.device = CPU
    ) -> torch.Tensor: ...

    def dense(
        self, name: str, *, start: int = 0, stop: int | None = None, device: torch.device = CPU
    ) -> torch.Tensor:
        return self.rows(name, start=start, stop=stop, device=device)

    @abstractmethod
    def lora_config(self) -> LoraConfig | ModelConfig:
        """The adapter's configuration, or the flags from which the run made it."""


class FinalArtifact(RunWeights):
    """The safetensors that train.py writes at its end. Raises UserError if a file is cut off."""

    def __init__(self, folder: Path, *, run_dir: Path) -> None:
        summary = read_summary(folder)
        values = summary.get("run")
        if values:
            with naming(folder / SUMMARY):
                record = RunRecord.from_json(values, file=folder / SUMMARY)
        else:
            record = newest_record(run_dir)
        super().__init__(folder, step=summary.get("steps"), record=record)
        self.summary = summary
        hashes = summary.get("sha256", {})
        weights = {name: hashes[name] for name in hashes if name.endswith(".safetensors")}
        if not weights and self.is_adapter:  # version 0.1.0 recorded none; an adapter is read fast
            with naming(folder / ADAPTER):
                weights = {ADAPTER: sha256(folder / ADAPTER)}
        self.weights_sha256 = sha256_of(weights) if weights else None
        self.lora_file = folder / "adapter_config.json"
        if self.is_adapter:
            self.files = read_names([folder / ADAPTER])
        else:
            self.files = BaseWeights(str(folder)).files
            read_names(sorted(set(self.files.values())))
        for name, file in self.files.items():
            with naming(file), safe_open(file, "pt") as tensors:
                self.shapes[name] = torch.Size(tensors.get_slice(name).get_shape())

    def rows(
        self, name: str, *, start: int = 0, stop: int | None = None, device: torch.device = CPU
    ) -> torch.Tensor:
        with naming(self.files[name]), safe_open(self.files[name], "pt") as tensors:
            rows = tensors.get_slice(name)[start:stop]
        rows = rows if self.is_adapter else rows.to(torch.bfloat16)
        return finite(rows, name, self.folder).to(device)

    def lora_config(self) -> LoraConfig:
        with naming(self.lora_file):
            return LoraConfig.from_pretrained(self.folder)


class SavedCheckpoint(RunWeights):
    """A checkpoint's weights in torch DCP's format, whatever number of ranks wrote them.

    Raises UserError if it is in DeepSpeed's format.
    """

    def __init__(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        super().__init__(folder, step=manifest["step"], record=read_record(folder))
        self.lora_file = folder / MANIFEST
        self.weights_sha256 = sha256_of(manifest["files"])
        if not (folder / METADATA).exists():
            raise UserError(f"{folder} is DeepSpeed's: export once the run has finished")
        self.reader = CheckpointReader(folder)
        stored = self.reader.read_metadata().state_dict_metadata
        self.stored: dict[str, str] = {}
        for key, entry in stored.items():
            if key.startswith(PREFIX) and isinstance(entry, TensorStorageMetadata):
                # PEFT's files leave out the adapter's name, "default"; its state dict has it.
                key = key.removeprefix(PREFIX)
                name = re.sub(r"\.(modules_to_save\.)?default\b", "", key)
                self.stored[name], self.shapes[name] = key, entry.size
        # The tensor that was read last: DCP reads whole tensors, and rows are asked for in turn.
        self.last: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def rows(
        self, name: str, *, start: int = 0, stop: int | None = None, device: torch.device = CPU
    ) -> torch.Tensor:
        """Raises UserError if the checkpoint cannot be read, or has been deleted meanwhile."""
        if self.last[0] != name:
            # DCP copies each rank's shard into this tensor, converting it: the whole tensor is
            # never held in the fp32 of the checkpoint, where a stack of 120b takes 8.5 GB.
            dtype = torch.float32 if self.is_adapter else torch.bfloat16
            self.last = ("", torch.empty(0))  # frees the previous tensor before the next is made
            tensor = torch.empty(self.shapes[name], dtype=dtype)
            try:
                state_dict = {"model": {self.stored[name]: tensor}}
                load_tensors(state_dict, self.reader, no_dist=True)
            except UserError as error:
                raise UserError(
                    f"{error}; if the run goes on and has deleted the checkpoint, export again to "
                    "another folder"
                ) from error
            self.last = (name, finite(tensor, name, self.folder))
        return self.last[1][start:stop].to(device)

    def lora_config(self) -> ModelConfig:
        return ModelConfig(use_peft=True, lora_dropout=0.0, **self.record.lora)


def finite(tensor: torch.Tensor, name: str, folder: Path) -> torch.Tensor:
    """The tensor. Raises UserError if a number in it is not finite: version 0.1.0 saved what a
    diverged run had left.
    """
    if not tensor.isfinite().all():
        raise UserError(f"{name} in {folder} is not finite: the run had diverged; train once more")
    return tensor


def newest_record(run_dir: Path) -> RunRecord:
    """The record in the run's newest complete checkpoint, for an artifact that holds none.

    Raises UserError if there is no such checkpoint.
    """
    newest = newest_checkpoint(run_dir)
    if newest is None:
        raise UserError(
            f"{run_dir} does not say which model was trained: its {SUMMARY} lacks it, "
            "and there is no complete checkpoint"
        )
    return read_record(newest)


def read_names(files: list[Path]) -> dict[str, Path]:
    """The file of each tensor in these safetensors, by the tensor's name.

    Raises UserError for a file that is missing or cut off: opening it compares its length with its
    header.
    """
    found: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is not complete: {str(error).splitlines()[0]}") from error
    return found


def find_run_weights(run_dir: Path, *, origin: str | None = None) -> RunWeights:
    """The run's final artifact or, if there is none, its newest complete checkpoint.

    run_dir: the run's folder, or its artifact alone. origin: the checkpoint to take, because an
    interrupted export began with it. Raises UserError if there is nothing to export, or if a file
    is not as it was written, by its size and SHA-256.
    """
    if not run_dir.is_dir():
        raise UserError(f"there is no run in {run_dir}: give the folder that holds its checkpoints")
    artifact = run_dir if os.path.lexists(run_dir / SUMMARY) else run_dir / ARTIFACT
    if not (origin or "").startswith("checkpoint"):
        if os.path.lexists(artifact) and not artifact.is_dir():
            raise UserError(f"{artifact} is not a folder: {REMEDY}")
        # Without a summary the run is still writing it, or was interrupted there.
        if os.path.lexists(artifact / SUMMARY):
            return FinalArtifact(artifact, run_dir=run_dir)
    problems: list[str] = []

    def skip(folder: Path, problem: str) -> None:
        print_skipped(folder, problem)
        problems.append(f"{folder.name}: {problem}")

    for folder in complete_checkpoints(run_dir, on_skip=skip):
        if origin in (None, folder.name):
            damage = check_hashes(folder)
            if damage is not None:
                raise UserError(f"{folder}: {damage}; delete it to export the one before")
            return SavedCheckpoint(folder)
    if origin is not None:
        raise UserError(
            f"--output holds the beginning of an export of {origin}, which the run has deleted "
            "since: give another --output"
        )
    raise UserError(
        "; ".join([f"nothing in {run_dir} is complete: no {ARTIFACT}/{SUMMARY}", *problems[:3]])
        + ("" if problems else ", no checkpoint")
    )
