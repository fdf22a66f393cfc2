"""Weights written to sharded safetensors, one stack of experts in memory at a time.

A shard that is on disk under its own name is whole: it was written under another and renamed. The
index comes last, so nothing loads what is half written, and a second call goes on where the first
was interrupted.
"""

import json
import shutil
from pathlib import Path
from typing import Literal

import torch
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from finetune.errors import UserError
from finetune.export.merge import CPU, MergedWeights
from finetune.model.mxfp4 import BLOCK_SIZE
from finetune.model.quantize import quantize, requantize

INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
Format = Literal["adapter", "bf16", "mxfp4"]


def num_bytes(merged: MergedWeights, name: str, *, form: Format) -> int:
    """Of a weight as it is written; MXFP4 has a byte for two values and one for each 32."""
    numel = merged.shape(name).numel()
    if form == "mxfp4" and merged.is_experts(name):
        return numel // 2 + numel // BLOCK_SIZE
    return 2 * numel


def plan_shards(merged: MergedWeights, *, form: Format, max_bytes: int) -> list[list[str]]:
    """The weights of each shard, in the model's order, at most max_bytes but for larger ones."""
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name in merged.names:
        size = num_bytes(merged, name, form=form)
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def stored_tensors(merged: MergedWeights, name: str, *, form: Format) -> dict[str, torch.Tensor]:
    """A weight as it is written: itself in bf16, or a stack's `_blocks` and `_scales`."""
    if form != "mxfp4" or not merged.is_experts(name):
        return {name: merged.dense(name)}
    num_experts, inner, out = merged.shape(name)
    groups = inner // BLOCK_SIZE
    all_blocks = torch.empty((num_experts, out, groups, BLOCK_SIZE // 2), dtype=torch.uint8)
    all_scales = torch.empty((num_experts, out, groups), dtype=torch.uint8)
    for start, stop in merged.chunks(name):
        weights = merged.rows(name, start, stop).transpose(1, 2).contiguous()
        if merged.base.is_packed(name):
            packed = merged.base.packed(name, device=CPU, start=start, stop=stop)
            blocks, scales = requantize(weights, packed.blocks, packed.scales)
        else:
            blocks, scales = quantize(weights)
        all_blocks[start:stop], all_scales[start:stop] = blocks, scales
    return {f"{name}_blocks": all_blocks, f"{name}_scales": all_scales}


def write_weights(
    merged: MergedWeights, output: Path, *, form: Format, max_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write every shard that is not there yet, then the index; progress goes to the terminal.

    Raises UserError if they do not fit on the disk.
    """
    shards = plan_shards(merged, form=form, max_bytes=max_bytes)
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    sizes = [sum(num_bytes(merged, name, form=form) for name in names) for names in shards]
    done = [is_whole(output / file) for file in files]
    check_space(output, sum(size for size, is_done in zip(sizes, done, strict=True) if not is_done))
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn()]
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(form, total=sum(sizes))
        for file, names, size, is_done in zip(files, shards, sizes, done, strict=True):
            if is_done:
                progress.advance(task, size)
                continue
            tensors: dict[str, torch.Tensor] = {}
            for name in names:
                tensors |= stored_tensors(merged, name, form=form)
                progress.advance(task, num_bytes(merged, name, form=form))
            write_shard(tensors, output / file)
    write_index(output, files)


def write_shard(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Under another name until it is whole."""
    part = file.with_name(f".{file.name}.part")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, part, metadata={"format": "pt"})
    part.rename(file)


def is_whole(file: Path) -> bool:
    """Whether a shard is there, as long as its header says."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def write_index(output: Path, files: list[str]) -> None:
    """Which shard holds which tensor, as transformers and vLLM look for it."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for file in files:
        with safe_open(output / file, "pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), file)
        total_size += (output / file).stat().st_size
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (output / INDEX).write_text(json.dumps(index, indent=2))


def check_space(folder: Path, wanted: int) -> None:
    """Raise UserError if the disk has less room than wanted bytes."""
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB of room, the export takes {wanted / 1e9:.1f} GB: "
            "free some, or give another --output"
        )
