"""Write a gpt-oss checkpoint of the true size that takes no room: its weights are a sparse file.

    python tests/helpers/sparse_checkpoint.py FOLDER 20b [NUM_LAYERS]

tests/helpers/loading_memory.py can measure how much memory loading it takes. All weights are zero.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import GptOssForCausalLM

from finetune.benchmark.synthetic import make_config

BYTES = {"BF16": 2, "U8": 1}


def entries(model: torch.nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and shape of each stored tensor, as published: experts in MXFP4."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3:
            num_experts, inner, out = parameter.shape
            found[f"{name}_blocks"] = ("U8", (num_experts, out, inner // 32, 16))
            found[f"{name}_scales"] = ("U8", (num_experts, out, inner // 32))
        else:
            found[name] = ("BF16", tuple(parameter.shape))
    return found


def save_sparse(folder: Path, size: str, num_layers: int | None) -> None:
    """Write config.json and model.safetensors. size: 20b or 120b; num_layers: None for all."""
    config = make_config(size, num_layers=num_layers)
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    header, end = {}, 0
    for name, (dtype, shape) in entries(model).items():
        start, end = end, end + BYTES[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the weights to begin at a multiple of 8
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # makes the file longer without writing anything


if __name__ == "__main__":
    save_sparse(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if sys.argv[3:] else None)
