"""Quantise bf16 expert weights to MXFP4, in the published layout that mxfp4.py describes.

The scale of a block is a power of two. OCP's specification takes it from the block's maximum alone:
the scale under which the maximum falls to 4..8, where 4 and 6 are FP4's largest values. Here that
scale, twice it and half of it are tried, and the one with the least squared error is kept. No other
scale can be better. The values of a coarser grid are all in the next finer one, as far as its range
goes. And a still finer one cuts the maximum off by more than the other 31 weights could gain.
"""

import torch

from finetune.errors import UserError
from finetune.model.mxfp4 import BLOCK_SIZE, FP4_MAGNITUDES, unpack

MAGNITUDES = torch.tensor(FP4_MAGNITUDES)
# Numbers are rounded to the nearest value, so the boundaries lie halfway between two values. On a
# boundary the even code is taken, as OCP has it: bucketize takes the lower one, so every second
# boundary is moved down by the smallest possible step.
BOUNDARIES = (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2
BOUNDARIES[1::2] = torch.nextafter(BOUNDARIES[1::2], torch.zeros(()))
BIAS, LARGEST_SCALE = 127, 254  # a scale of 255 means NaN


def quantize(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (E, out, in / 32, 16) and scales (E, out, in / 32) of weights (E, out, in), uint8.

    Raises UserError if a weight is infinite or NaN, or if "in" is no multiple of 32.
    """
    if weights.shape[-1] % BLOCK_SIZE:
        raise UserError(f"MXFP4 holds rows of a multiple of 32 weights, not of {weights.shape[-1]}")
    # Expert by expert: trying the three scales takes several fp32 copies of what is quantised.
    pairs = [quantize_blocks(expert.unflatten(-1, (-1, BLOCK_SIZE))) for expert in weights]
    blocks, scales = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return blocks, scales


def quantize_blocks(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes (..., 16) and scales (...) of blocks of 32 weights (..., 32)."""
    weights = weights.float()
    maxima = weights.abs().amax(-1)
    if not torch.isfinite(maxima).all():
        raise UserError("a weight is infinite or NaN: the run has diverged, take one before it")
    # The exponent e of 2 ** e under which the maximum falls to 4..8. frexp's mantissas are in
    # 0.5..1, so that its exponent of 4 is 3. A block of zeros takes the smallest scale.
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
    """FP4 codes (..., 32) of blocks under scales 2 ** exponents (...), and their squared errors."""
    scales = torch.ldexp(torch.ones(exponents.shape), exponents)[..., None]
    magnitudes = weights.abs()
    codes = torch.bucketize((magnitudes / scales).contiguous(), BOUNDARIES, out_int32=True)
    errors = (MAGNITUDES[codes] * scales - magnitudes).square_().sum(-1, dtype=torch.float64)
    return codes.to(torch.uint8) | weights.signbit().to(torch.uint8) << 3, errors


def requantize(
    weights: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise bf16 weights that were unpacked from these blocks and scales and then changed.

    A block whose weights are still the same, bit for bit, keeps its bytes. `quantize` alone could
    write other bytes for the same values: several pairs of codes and scale mean the same.
    """
    # Compared as integers: as floats, -0.0 and 0.0 would be equal.
    before = unpack(blocks, scales).view(torch.int16)
    same = (weights.view(torch.int16) == before).unflatten(-1, (-1, BLOCK_SIZE)).all(-1)
    if same.all():
        return blocks, scales
    new_blocks, new_scales = quantize(weights)
    return torch.where(same[..., None], blocks, new_blocks), torch.where(same, scales, new_scales)
