"""Write the trained model as one GGUF file, for llama.cpp and the programs that build on it.

The file is written weight by weight, with some experts in memory at a time, under another name. A
journal beside it lists the weights that are on the disk, so a second call goes on where the first
was interrupted. Complete, the file gets its own name.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import PreTrainedTokenizerBase

from finetune.export.gguf_layout import (
    BLOCK_BYTES,
    Part,
    keeps_fp32,
    name_map,
    parts_of,
    to_ggml_blocks,
)
from finetune.export.gguf_metadata import add_tokenizer, model_writer
from finetune.export.merge import MergedWeights
from finetune.export.shards import check_space, free_bytes, packed_chunks, show_progress
from finetune.model.loading import load_config
from finetune.model.mxfp4 import BLOCK_SIZE

MODEL = "model.gguf"
DTYPES = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.BF16: torch.bfloat16}


class Place(NamedTuple):
    """Where a tensor lies in the file, in bytes."""

    offset: int
    length: int


def write_model(
    merged: MergedWeights,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    name: str,
    free_bytes: Callable[[Path], int] = free_bytes,
) -> None:
    """Write output/model.gguf, unless it is there already; show a bar of progress.

    name: of the model, shown by the programs that load it. Raises UserError before a weight is
    written if they do not fit on the disk.
    """
    header, part, journal = (output / f".{MODEL}.{end}" for end in ("header", "part", "journal"))
    if (output / MODEL).exists():
        journal.unlink(missing_ok=True)  # the last that a call does, which may have been killed
        return
    config = load_config(merged.base.model_id, revision=merged.base.revision)
    names = name_map(config.num_hidden_layers)
    parts = {source: parts_of(source, names) for source in merged.names}
    writer = model_writer(header, config, name=name)
    add_tokenizer(writer, tokenizer, vocab_size=config.vocab_size)
    places = write_header(writer, merged, parts)
    size = max(place.offset + place.length for place in places.values())
    written = begin(header, part, journal)
    check_space(output, size - part.stat().st_blocks * 512, free=free_bytes(output))
    total = sum(place.length for place in places.values())
    with show_progress("gguf", total=total) as advance, open(part, "r+b") as file:
        file.truncate(size)
        for source in merged.names:
            if source not in written:
                num_rows = merged.shape(source)[0]
                for tensor, row, data in encoded(merged, source, parts[source]):
                    place = places[tensor]
                    file.seek(place.offset + place.length // num_rows * row)
                    file.write(data.contiguous().view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())
                with open(journal, "a") as lines:
                    lines.write(f"{source}\n")
            advance(sum(places[piece.name].length for piece in parts[source]))
    part.rename(output / MODEL)
    journal.unlink()


def write_header(
    writer: GGUFWriter, merged: MergedWeights, parts: dict[str, list[Part]]
) -> dict[str, Place]:
    """Write all that stands before the weights, and return where each of them will lie, by name."""
    lengths = {}
    for source, pieces in parts.items():
        for piece in pieces:
            shape, kind = stored_as(merged, source, piece)
            is_packed = kind == GGMLQuantizationType.MXFP4
            dtype = torch.uint8 if is_packed else DTYPES[kind]
            lengths[piece.name] = shape.numel() * dtype.itemsize
            # Of MXFP4 the shape is given in bytes; the writer computes that in weights from it.
            writer.add_tensor_info(
                piece.name,
                shape,
                np.dtype(np.uint8 if is_packed else np.float32),
                lengths[piece.name],
                raw_dtype=kind,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    offset = writer.ggml_pad(writer.fout[0].tell(), writer.data_alignment)
    writer.close()
    places = {}
    for name, length in lengths.items():
        places[name] = Place(offset, length)
        offset += writer.ggml_pad(length, writer.data_alignment)
    return places


def stored_as(
    merged: MergedWeights, source: str, piece: Part
) -> tuple[torch.Size, GGMLQuantizationType]:
    """The shape of a tensor in the file, of MXFP4 in bytes, and its type."""
    shape = merged.shape(source)
    if merged.is_experts(source):
        num_experts, inner, out = shape
        num_outputs = len(range(out)[piece.outputs])
        size = torch.Size((num_experts, num_outputs, inner // BLOCK_SIZE * BLOCK_BYTES))
        return size, GGMLQuantizationType.MXFP4
    kind = GGMLQuantizationType.F32 if keeps_fp32(source, shape) else GGMLQuantizationType.BF16
    if piece.outputs == slice(None):
        return shape, kind
    return torch.Size((*shape[:-1], len(range(shape[-1])[piece.outputs]))), kind


def encoded(
    merged: MergedWeights, source: str, pieces: list[Part]
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """A weight as it is stored, some rows at a time: the tensor's name, the first of the
    rows, and the rows.
    """
    if merged.is_experts(source):
        for start, _, blocks, scales in packed_chunks(merged, source):
            for piece in pieces:
                some = to_ggml_blocks(blocks[:, piece.outputs], scales[:, piece.outputs])
                yield piece.name, start, some
        return
    for start, stop in merged.chunks(source):
        rows = merged.rows(source, start=start, stop=stop)
        for piece in pieces:
            _, kind = stored_as(merged, source, piece)
            # A vector's rows are its numbers. Only the biases of gate and up are taken in part.
            some = rows if piece.outputs == slice(None) else rows[..., piece.outputs]
            yield piece.name, start, some.to(DTYPES[kind])


def begin(header: Path, part: Path, journal: Path) -> set[str]:
    """Give `part` the header, and return the weights that an interrupted call has written to it.

    If what it wrote has another header, it was another export: start anew.
    """
    text = header.read_bytes()
    if part.exists() and journal.exists():
        with open(part, "rb") as file:
            if file.read(len(text)) == text:
                header.unlink()
                # A line without its end is cut off, and may be the beginning of a longer name.
                return set(journal.read_text().split("\n")[:-1])
    journal.write_text("")
    header.rename(part)
    return set()
