"""How gpt-oss's weights lie in a GGUF file, which differs from how they are published in four ways.

- Names are llama.cpp's: `blk.0.attn_q.weight` for `model.layers.0.self_attn.q_proj.weight`.
- Gate and up are two tensors. Published, they are the even and the odd outputs of `gate_up_proj`.
- A block of MXFP4 is 17 bytes: the scale, then 16 bytes whose low halves are the weights 0 to 15
  and whose high halves are the weights 16 to 31. Published, scales are a tensor of their own, and a
  byte holds two neighbours, 2 i in its low half and 2 i + 1 in its high half.
- Norms, biases, sinks and the router are in fp32, everything else beside the experts in bf16.
"""

import re
from dataclasses import dataclass

import torch
from gguf import GGMLQuantizationType, TensorNameMap, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES, MODEL_ARCH

from finetune.model.mxfp4 import BLOCK_SIZE

BLOCK_BYTES = GGML_QUANT_SIZES[GGMLQuantizationType.MXFP4][1]
GATE_UP = "gate_up_proj"


@dataclass(frozen=True)
class Part:
    """A tensor of a GGUF file: the outputs of a published weight that belong to it.

    outputs: which indices of the weight's "out" dimension; all, or every second for gate and up.
    """

    name: str
    outputs: slice


def name_map(num_layers: int) -> TensorNameMap:
    """The names of llama.cpp by those of the Hugging Face checkpoint, for this many layers."""
    return get_tensor_name_map(MODEL_ARCH.GPT_OSS, num_layers)


def parts_of(source: str, names: TensorNameMap) -> list[Part]:
    """The tensors of a GGUF file that hold this weight of GptOssForCausalLM, by name."""
    if GATE_UP in source:
        halves = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
    else:
        halves = {"": slice(None)}
    parts = []
    for half, outputs in halves.items():
        name = source.replace(GATE_UP, half) if half else source
        # The experts' stacks and the sinks lack the suffix that every other parameter has.
        name = re.sub(r"(experts\.\w+?_proj)(_bias)?$", _with_suffix, name)
        name = re.sub(r"sinks$", "sinks.weight", name)
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, f"gguf has no name for {name}"
        parts.append(Part(found, outputs))
    return parts


def _with_suffix(match: re.Match[str]) -> str:
    return f"{match[1]}.bias" if match[2] else f"{match[1]}.weight"


def keeps_fp32(source: str, shape: torch.Size) -> bool:
    """Whether llama.cpp wants a weight in fp32: what is small and added, or decides on experts."""
    return len(shape) == 1 or source.endswith("_bias") or ".router." in source


def to_ggml_blocks(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Published MXFP4 as ggml has it, bit for bit: (E, out, in / 32 * 17) uint8.

    blocks: (E, out, in / 32, 16), scales: (E, out, in / 32), both uint8.
    """
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    low, high = codes[..., : BLOCK_SIZE // 2], codes[..., BLOCK_SIZE // 2 :]
    return torch.cat([scales[..., None], low | high << 4], dim=-1).flatten(-2)
