"""bf16 expert weights back to MXFP4, in the layout of mxfp4.py (the published one).

A block's scale is the one that leaves the least squared error of three: the largest at which the
block's maximum still uses FP4's top two values, twice that, half that. No other can be better: a
coarser grid is part of the next finer one, and a finer one cuts the maximum by more than the other
31 weights could gain. That is not the scale of the maximum alone, which OCP's specification takes.
"""

import torch

from finetune.errors import UserError
from finetune.model.mxfp4 import BLOCK_SIZE, FP4_VALUES, unpack

POSITIVE = torch.tensor(FP4_VALUES[:8])
# Halfway between two values; ties go to the one with an even code, as OCP has it.
BOUNDARIES = (POSITIVE[1:] + POSITIVE[:-1]) / 2
BOUNDARIES[1::2] = torch.nextafter(BOUNDARIES[1::2], torch.zeros(()))
BIAS, LARGEST_SCALE = 127, 254  # 255 is NaN


def quantize(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (E, out, in / 32, 16) and scales (E, out, in / 32) of weights (E, out, in), expert by
    expert. Raises UserError if a weight is not finite.
    """
    if weights.shape[-1] % BLOCK_SIZE:
        raise UserError(f"MXFP4 holds rows of a multiple of 32 weights, not of {weights.shape[-1]}")
    pairs = [quantize_blocks(expert.unflatten(-1, (-1, BLOCK_SIZE))) for expert in weights]
    blocks, scales = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return blocks, scales


def quantize_blocks(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of blocks (..., 32): (..., 16) and (...)."""
    weights = weights.float()
    maxima = weights.abs().amax(-1)
    if not torch.isfinite(maxima).all():
        raise UserError("a weight is infinite or NaN: the run has diverged, take one before it")
    # 4 and 6 have an exponent of 2, frexp's is one more.
    exponents = torch.where(maxima > 0, torch.frexp(maxima).exponent - 3, -BIAS)
    best_scales = exponents.clamp(-BIAS, LARGEST_SCALE - BIAS)
    best_codes, least = encode(weights, best_scales)
    for shift in (1, -1):
        scales = (exponents + shift).clamp(-BIAS, LARGEST_SCALE - BIAS)
        codes, errors = encode(weights, scales)
        better = errors < least
        least = torch.where(better, errors, least)
        best_scales = torch.where(better, scales, best_scales)
        best_codes = torch.where(better[..., None], codes, best_codes)
    even, odd = best_codes[..., ::2], best_codes[..., 1::2]
    return even | odd << 4, (best_scales + BIAS).to(torch.uint8)


def encode(weights: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP4 codes (..., 32) of blocks under scales 2 ** exponents (...), and each block's squared
    error.
    """
    scales = torch.ldexp(torch.ones(exponents.shape), exponents)[..., None]
    magnitudes = weights.abs()
    codes = torch.bucketize((magnitudes / scales).contiguous(), BOUNDARIES, out_int32=True)
    errors = (POSITIVE[codes] * scales - magnitudes).square_().sum(-1, dtype=torch.float64)
    return codes.to(torch.uint8) | weights.signbit().to(torch.uint8) << 3, errors


def requantize(
    weights: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As quantize, of bf16 weights that came from these blocks and scales: a block that has not
    changed keeps its bytes, of which there can be several for the same values.
    """
    before = unpack(blocks, scales).view(torch.int16)
    same = (weights.view(torch.int16) == before).unflatten(-1, (-1, BLOCK_SIZE)).all(-1)
    if same.all():
        return blocks, scales
    new_blocks, new_scales = quantize(weights)
    return torch.where(same[..., None], blocks, new_blocks), torch.where(same, scales, new_scales)
