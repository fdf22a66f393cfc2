"""Unpacking MXFP4 on a GPU: one pass, bound by what it reads (a quarter) and what it writes."""

import torch
import triton
import triton.language as tl

BYTES = 1024  # a program unpacks this many


@triton.jit
def unpack_kernel(blocks, scales, weights, num_bytes, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = offsets < num_bytes
    byte = tl.load(blocks + offsets, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + offsets // 16, mask=inside, other=0).to(tl.int32)
    both = tl.program_id(0).to(tl.int64) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    values = tl.interleave(bf16_bits(byte & 15, scale), bf16_bits(byte >> 4, scale))
    tl.store(weights + both, values.to(tl.int16), mask=both < 2 * num_bytes)


@triton.jit
def bf16_bits(code, scale):  # type: ignore[no-untyped-def]
    """An FP4 value (E2M1: 1 bit of sign, 2 of exponent with bias 1, 1 of mantissa) times 2 to the
    scale - 127, as the bits of a bf16 (1, 8 with bias 127, 7). From integers: no rounding, nothing
    flushed to zero.
    """
    magnitude = code & 7
    is_half = magnitude == 1  # FP4's only subnormal
    exponent = tl.where(is_half, -1, (magnitude >> 1) - 1) + scale
    mantissa = tl.where(is_half, 0, (magnitude & 1) << 6)
    normal = (exponent << 7) | mantissa
    subnormal = (128 | mantissa) >> tl.maximum(1 - exponent, 0)
    bits = tl.where(exponent > 0, normal, subnormal)
    bits = tl.where(exponent > 254, 255 << 7, bits)  # infinity
    return tl.where(magnitude == 0, 0, bits) | (code >> 3) << 15


def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """As mxfp4.unpack: blocks (E, out, in / 32, 16), scales (E, out, in / 32) -> (E, out, in)."""
    blocks, scales = blocks.contiguous(), scales.contiguous()
    shape = (*scales.shape[:-1], scales.shape[-1] * 32)
    weights = torch.empty(shape, dtype=torch.int16, device=blocks.device)
    grid = (triton.cdiv(blocks.numel(), BYTES),)
    unpack_kernel[grid](blocks, scales, weights, blocks.numel(), BYTES=BYTES)
    return weights.view(torch.bfloat16)
