"""Quantise bf16 expert weights to MXFP4, in the published layout that mxfp4.py describes.

The scale of a block is a power of two. OCP's specification takes it from the block's maximum alone:
the scale under which the maximum falls to 4..8, where 4 and 6 are FP4's largest values. Here that
scale, twice it and half of it are tried, and the one with the least squared error is kept. No other
scale can be better. The values of a coarser grid are all in the next finer one, as far as its range
goes. And a still finer one cuts the maximum off by more than the other 31 weights could gain.
"""

from concurrent.futures import ThreadPoolExecutor

import torch

from finetune.errors import UserError
from finetune.model.mxfp4 import BLOCK_SIZE, FP4_MAGNITUDES, unpack

LARGEST_SCALE = 254  # 255 means NaN
EXPONENT_SHIFT, EXPONENT_BITS = 23, 0x7F800000  # of fp32
LARGEST = max(FP4_MAGNITUDES)
# How many blocks are quantised at a time. Their copies in fp32, 125 KiB each, stay in the
# processor's cache. They are too few for PyTorch to split: each thread takes parts of its own.
MAX_BLOCKS = 1000


def quantize(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks (E, out, in / 32, 16) and scales (E, out, in / 32) of weights (E, out, in), uint8.

    Raises UserError if a weight is infinite or NaN, or if "in" is no multiple of 32.
    """
    if weights.shape[-1] % BLOCK_SIZE:
        raise UserError(f"MXFP4 holds rows of a multiple of 32 weights, not of {weights.shape[-1]}")
    grouped = weights.unflatten(-1, (-1, BLOCK_SIZE))
    blocks = torch.empty((*grouped.shape[:-1], BLOCK_SIZE // 2), dtype=torch.uint8)
    scales = torch.empty(grouped.shape[:-1], dtype=torch.uint8)
    parts = grouped.flatten(0, -2), blocks.flatten(0, -2), scales.flatten()

    def fill(some: torch.Tensor, to_blocks: torch.Tensor, to_scales: torch.Tensor) -> None:
        new_blocks, new_scales = quantize_blocks(some)
        to_blocks.copy_(new_blocks)
        to_scales.copy_(new_scales)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(fill, *(part.split(MAX_BLOCKS) for part in parts)))
    return blocks, scales


def quantize_blocks(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes (N, 16) and scales (N) of N blocks of 32 weights (N, 32)."""
    weights = weights.float()
    magnitudes = weights.abs()
    maxima = magnitudes.amax(-1)
    if not torch.isfinite(maxima).all():
        raise UserError("a weight is infinite or NaN: the run has diverged, take one before it")
    # The biased exponent of the maximum, less 2: under 2 to this power it falls to 4..8.
    by_maximum = (maxima.view(torch.int32) >> EXPONENT_SHIFT) - 2
    best = by_maximum.clamp(0, LARGEST_SCALE)
    least = squared_error(magnitudes, best)
    for shift in (1, -1):
        scales = (by_maximum + shift).clamp(0, LARGEST_SCALE)
        errors = squared_error(magnitudes, scales)
        best = torch.where(errors < least, scales, best)
        least = torch.minimum(errors, least)
    values = nearest(magnitudes / powers_of_two(best)[:, None])
    # The codes 0 to 4 lie 1/2 apart, 4 to 6 lie 1 apart, and 7 is 2 beyond 6.
    codes = torch.minimum(torch.minimum(2 * values, values + 2), values / 2 + 4).to(torch.uint8)
    codes |= weights.signbit().to(torch.uint8) << 3
    return codes[:, ::2] | codes[:, 1::2] << 4, best.to(torch.uint8)


def powers_of_two(scales: torch.Tensor) -> torch.Tensor:
    """2 ** (scales - 127) in fp32, of int32 in 0..254: a scale is fp32's own biased exponent."""
    # 2 ** -127 is below the normal numbers: its exponent is 0 and its first bit is set.
    return (scales << EXPONENT_SHIFT).clamp(min=1 << EXPONENT_SHIFT - 1).view(torch.float32)


def squared_error(magnitudes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What rounding to FP4 under these scales (N) costs blocks (N, 32), in float64."""
    powers = powers_of_two(scales)
    scaled = magnitudes / powers[:, None]
    errors = (nearest(scaled) - scaled).square_().sum(-1, dtype=torch.float64)
    return errors * powers.double().square()


def nearest(scaled: torch.Tensor) -> torch.Tensor:
    """The nearest of FP4's magnitudes; halfway between two the one of the even code, as OCP has it.

    FP4's values are 1/2 apart below 2, 1 apart from 2 to 4, and 2 apart above. torch.round takes
    the even number of steps, and that is the even code.
    """
    floors = (scaled.view(torch.int32) & EXPONENT_BITS).view(torch.float32)  # 1 for 1..2
    steps = floors.clamp_(1, 4).div_(2)
    return (scaled / steps).round_().mul_(steps).clamp_(max=LARGEST)


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
