"""Quantising bf16 to MXFP4 is exact where it can be, and has the least error where it cannot."""

import pytest
import torch

from finetune.errors import UserError
from finetune.model.mxfp4 import unpack
from finetune.model.quantize import MAX_BLOCKS, quantize, quantize_blocks, requantize
from helpers.packed import every_value, random_packed


def error(weights: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The squared error of each block, in float64."""
    difference = unpack(blocks, scales).double() - weights.double()
    return difference.unflatten(-1, (-1, 32)).square().sum(-1)


def quantize_under(weights: torch.Tensor, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every block (1, N, 32) under this scale, each weight by the nearest of all 16 values."""
    values = unpack(
        torch.arange(16, dtype=torch.uint8).view(1, 1, 1, 16), torch.tensor([[[scale]]])
    )
    values = values.flatten()[::2].float()
    codes = (weights.float()[..., None] - values).abs().argmin(-1).to(torch.uint8)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    return blocks.unsqueeze(2), torch.full((*blocks.shape[:2], 1), scale, dtype=torch.uint8)


def test_every_value_of_the_format_comes_back() -> None:
    """Also from blocks whose maximum is one of FP4's smallest values."""
    blocks, scales = every_value()
    # Each mask makes versions of the blocks whose largest code is smaller.
    masks = torch.tensor([0x00, 0x11, 0x99, 0x22, 0xAA, 0x33, 0x55, 0x77, 0xFF])
    for mask in masks.to(torch.uint8):
        # Not the largest scales: 6 * 2 ** 127 is more than bf16 holds.
        values = unpack(blocks & mask, scales)[:, :253].contiguous()
        again = unpack(*quantize(values))
        assert torch.equal(again, values)
        assert torch.equal(again.signbit(), values.signbit())


def test_unchanged_blocks_keep_their_bytes() -> None:
    blocks, scales = random_packed()
    blocks[0, 0] = 0  # a block of zeros under any scale, one of negative zeros, one of small codes
    blocks[0, 1] = 0x88
    blocks[0, 2] &= 0x11
    weights = unpack(blocks, scales)
    kept_blocks, kept_scales = requantize(weights, blocks, scales)
    assert torch.equal(kept_blocks, blocks) and torch.equal(kept_scales, scales)
    assert not torch.equal(quantize(weights)[1], scales)  # quantize alone writes other bytes

    weights[3, 5, 40] += 1
    changed_blocks, changed_scales = requantize(weights, blocks, scales)
    differs = (changed_blocks != blocks).any(-1) | (changed_scales != scales)
    assert differs.nonzero().tolist() == [[3, 5, 1]]
    assert torch.equal(changed_blocks[3, 5, 1], quantize(weights)[0][3, 5, 1])


@pytest.mark.parametrize("kind", ["normal", "outlier", "uniform", "top"])
def test_no_other_scale_has_a_smaller_error(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1, 500, 32, generator=generator) * 0.02
    if kind == "outlier":
        weights[..., 0] *= 20
    elif kind == "uniform":
        weights = torch.rand(1, 500, 32, generator=generator)
    elif kind == "top":  # blocks for which it is better to cut off the maximum
        weights = 0.25 + 0.01 * weights
        weights[..., 0] = 4.1
    weights = weights.bfloat16()
    ours = error(weights, *quantize(weights))
    every = torch.stack([error(weights, *quantize_under(weights, s)) for s in range(105, 140)])
    torch.testing.assert_close(ours, every.min(0).values, rtol=1e-6, atol=0)
    by_maximum = torch.frexp(weights.float().abs().amax(-1)).exponent - 3 + 127
    best = 105 + every.argmin(0).squeeze(-1)
    if kind != "top":
        assert (best != by_maximum).any()  # the scale of the maximum alone is worse somewhere


def test_all_three_scales_are_needed() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for tail in (0.25, 0.5, 1.0, 3.0):
        weights = tail * torch.rand(2000, 32, generator=generator)
        weights[:, 0] = 4 + 4 * torch.rand(2000, generator=generator)
        weights[:500, 1:] = 0.25
        weights[:500, 0] = 4
        seen |= set((quantize_blocks(weights)[1].int() - 127).unique().tolist())
    assert seen == {-1, 0, 1}


@pytest.mark.parametrize("exponent", [-100, -60, 100])
def test_weights_of_any_size_are_rounded_alike(exponent: int) -> None:
    """Their squared errors must neither vanish nor become infinite. Also of many blocks."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 40, 32 * (MAX_BLOCKS // 40), generator=generator).bfloat16()
    blocks, scales = quantize(weights)
    some_blocks, some_scales = quantize_blocks(weights[1].unflatten(-1, (-1, 32)).flatten(0, 1))
    assert blocks[1].equal(some_blocks.view(blocks[1].shape))
    assert scales[1].equal(some_scales.view(scales[1].shape))
    scaled_blocks, scaled_scales = quantize(torch.ldexp(weights, torch.tensor(exponent)))
    assert scaled_blocks.equal(blocks)
    assert (scaled_scales.int() - exponent).equal(scales.int())


def test_infinite_weights_and_rows_of_other_lengths_are_refused() -> None:
    weights = torch.zeros(1, 1, 32)
    weights[0, 0, 3] = float("inf")
    with pytest.raises(UserError, match="infinite or NaN"):
        quantize(weights)
    with pytest.raises(UserError, match="multiple of 32"):
        quantize(torch.zeros(1, 1, 33))
