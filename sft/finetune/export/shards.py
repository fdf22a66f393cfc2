"""Write weights to sharded safetensors, with one stack of experts in memory at a time.

Each shard is written in a folder of its own and then moved out, so a shard in its place is
complete: a second call goes on where the first was interrupted. The index is written last, because
nothing can load the folder without it.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
from finetune.export.merge import MergedWeights
from finetune.export.record import Format
from finetune.model.mxfp4 import BLOCK_SIZE
from finetune.model.quantize import quantize, requantize
from finetune.model.weights import read_packed

INDEX = "model.safetensors.index.json"
UNFINISHED = ".unfinished"
MAX_SHARD_BYTES = 5 * 10**9


def num_bytes(merged: MergedWeights, name: str, *, form: Format) -> int:
    """The size of a weight as it is written: in MXFP4 a byte for 2 values and one for every 32."""
    numel = merged.shape(name).numel()
    if form == "mxfp4" and merged.is_experts(name):
        return numel // 2 + numel // BLOCK_SIZE
    return 2 * numel


def plan_shards(merged: MergedWeights, *, form: Format, max_bytes: int) -> list[list[str]]:
    """The names of the weights in each shard, in the order of the model.

    A shard has at most max_bytes, except if a single weight is larger.
    """
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
    """The tensors that are stored for a weight: itself in bf16, or its `_blocks` and `_scales`."""
    if form != "mxfp4" or not merged.is_experts(name):
        return {name: merged.dense(name)}
    num_experts, inner, out = merged.shape(name)
    groups = inner // BLOCK_SIZE
    all_blocks = torch.empty((num_experts, out, groups, BLOCK_SIZE // 2), dtype=torch.uint8)
    all_scales = torch.empty((num_experts, out, groups), dtype=torch.uint8)
    for start, stop, blocks, scales in packed_chunks(merged, name):
        all_blocks[start:stop], all_scales[start:stop] = blocks, scales
    return {f"{name}_blocks": all_blocks, f"{name}_scales": all_scales}


def packed_chunks(
    merged: MergedWeights, name: str
) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
    """A stack of experts in MXFP4, some experts at a time: the first, the one after the last, their
    blocks (stop - start, out, in / 32, 16) and their scales (stop - start, out, in / 32).

    Blocks that training has not changed keep the bytes of the published checkpoint.
    """
    for start, stop in merged.chunks(name):
        # MXFP4's blocks lie along "in", which is the last dimension of the stored layout.
        weights = merged.rows(name, start=start, stop=stop).transpose(1, 2).contiguous()
        if merged.base.is_packed(name):
            packed = read_packed(merged.base, name, start=start, stop=stop)
            yield start, stop, *requantize(weights, packed.blocks, packed.scales)
        else:
            yield start, stop, *quantize(weights)


def free_bytes(folder: Path) -> int:
    """The room on the disk of this folder."""
    return shutil.disk_usage(folder).free


def write_weights(
    merged: MergedWeights,
    output: Path,
    *,
    form: Format,
    max_bytes: int = MAX_SHARD_BYTES,
    free_bytes: Callable[[Path], int] = free_bytes,
) -> None:
    """Write every shard that is not there yet, then the index; show a bar of progress.

    Raises UserError before anything is written if the shards do not fit on the disk.
    """
    shards = plan_shards(merged, form=form, max_bytes=max_bytes)
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    sizes = [sum(num_bytes(merged, name, form=form) for name in names) for names in shards]
    done = [is_complete(output / file) for file in files]
    missing = sum(size for size, is_done in zip(sizes, done, strict=True) if not is_done)
    delete_unfinished(output)  # before the room is measured
    check_space(output, missing, free=free_bytes(output))
    with show_progress(form, total=sum(sizes)) as advance:
        for file, names, size, is_done in zip(files, shards, sizes, done, strict=True):
            if is_done:
                advance(size)
                continue
            tensors: dict[str, torch.Tensor] = {}
            for name in names:
                tensors |= stored_tensors(merged, name, form=form)
                advance(num_bytes(merged, name, form=form))
            write_shard(tensors, output / file)
    write_index(output, files)


@contextmanager
def show_progress(form: Format, *, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar of `total` bytes; what it gives adds bytes that are written."""
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn()]
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(form, total=total)
        yield lambda size: progress.advance(task, size)


def write_shard(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file in a folder beside it, and move it out once it is complete.

    The caller has called delete_unfinished.
    """
    folder = file.parent / UNFINISHED
    folder.mkdir()
    part = folder / file.name
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, part, metadata={"format": "pt"})
    # safetensors 0.8.0 makes files that no other user may read, whatever the umask says (its issue
    # 782; to be deleted with the release that has its pull request 789). A folder's mode obeys it.
    part.chmod(folder.stat().st_mode & 0o666)
    part.rename(file)
    folder.rmdir()


def delete_unfinished(output: Path) -> None:
    """Delete the shard that a killed call was writing.

    It is in a folder of its own, because safetensors writes it under a name that nobody knows.
    """
    if (output / UNFINISHED).exists():
        shutil.rmtree(output / UNFINISHED)


def is_complete(file: Path) -> bool:
    """Whether a shard is there and as long as its header says."""
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def write_index(output: Path, files: list[str]) -> None:
    """Write the list of which shard holds which tensor, which transformers and vLLM read."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for file in files:
        with safe_open(output / file, "pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), file)
        total_size += (output / file).stat().st_size
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (output / INDEX).write_text(json.dumps(index, indent=2))


def check_space(folder: Path, wanted: int, *, free: int) -> None:
    """Raise UserError if fewer bytes are free than wanted."""
    if free < wanted:
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB of room, the export takes {wanted / 1e9:.1f} GB: "
            "free some, or give another --output"
        )
