"""Unpack MXFP4 to bf16 on a GPU in one pass, with a Triton kernel.

Its time is that of the memory traffic: it reads a quarter of what it writes. PyTorch's own
operations would write and read intermediate results several times the size of the weights.
"""

import torch
import triton
import triton.language as tl

BYTES = 1024  # of packed values that one program unpacks; each byte becomes two weights


@triton.jit
def unpack_kernel(blocks, scales, weights, num_bytes, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    # 64 bits: a stack of 120b has 2.12e9 weights, hardly less than 32 bits with a sign can count.
    offsets = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = offsets < num_bytes
    byte = tl.load(blocks + offsets, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + offsets // 16, mask=inside, other=0).to(tl.int32)
    # The low half of a byte is the weight that comes first. Both are interleaved before they are
    # stored, so that neighbouring threads write neighbouring addresses, 16 bytes at a time.
    both = tl.program_id(0).to(tl.int64) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    values = tl.interleave(bf16_bits(byte & 15, scale), bf16_bits(byte >> 4, scale))
    tl.store(weights + both, values.to(tl.int16), mask=both < 2 * num_bytes)


@triton.jit
def bf16_bits(code, scale):  # type: ignore[no-untyped-def]
    """The bits of the bf16 number that equals an FP4 value times 2 ** (scale - 127).

    FP4 (E2M1) has 1 bit of sign, 2 of exponent with bias 1 and 1 of mantissa; bf16 has 1, 8 with
    bias 127, and 7. The bits are put together with integer operations, because floating-point
    multiplication may flush subnormal results to zero.
    """
    magnitude = code & 7
    is_half = magnitude == 1  # 0.5 is FP4's only subnormal: it has no implicit leading 1
    # bf16's biased exponent: (FP4's exponent - 1) + (scale - 127) + 127. 0.5 is 1.0 * 2 ** -1.
    exponent = tl.where(is_half, -1, (magnitude >> 1) - 1) + scale
    mantissa = tl.where(is_half, 0, (magnitude & 1) << 6)  # FP4's bit becomes the highest of seven
    normal = (exponent << 7) | mantissa
    # Below bf16's smallest exponent the leading 1 becomes explicit and all bits move to the right.
    subnormal = (128 | mantissa) >> tl.maximum(1 - exponent, 0)
    bits = tl.where(exponent > 0, normal, subnormal)
    bits = tl.where(exponent > 254, 255 << 7, bits)  # infinity
    return tl.where(magnitude == 0, 0, bits) | (code >> 3) << 15


def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Of blocks (E, out, in / 32, 16) and scales (E, out, in / 32), the weights: (E, out, in)."""
    blocks, scales = blocks.contiguous(), scales.contiguous()
    shape = (*scales.shape[:-1], scales.shape[-1] * 32)
    # Triton cannot store integers to a bf16 tensor; the bits are the same.
    weights = torch.empty(shape, dtype=torch.int16, device=blocks.device)
    grid = (triton.cdiv(blocks.numel(), BYTES),)
    unpack_kernel[grid](blocks, scales, weights, blocks.numel(), BYTES=BYTES)
    return weights.view(torch.bfloat16)
