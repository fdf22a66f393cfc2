"""Expert weights in MXFP4 without a model: blocks (E, out, in / 32, 16) and scales."""

import torch

NUM_EXPERTS, OUT, IN = 5, 24, 64


def random_packed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks and scales of NUM_EXPERTS experts, of weights around 0.01."""
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_EXPERTS, OUT, IN // 32)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)


def every_value() -> tuple[torch.Tensor, torch.Tensor]:
    """Every byte under every scale except 255, which means NaN."""
    blocks = torch.arange(256, dtype=torch.uint8).repeat(255, 1).view(1, 255, 16, 16)
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].expand(1, 255, 16).contiguous()
    return blocks, scales
