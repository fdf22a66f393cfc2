"""RMSNorm by torch's kernel is transformers' own, in its output and its gradients."""

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

from finetune.model.norms import FusedRMSNorm, use_fused_norms
from helpers.tensors import GPU


def norm_of(x: torch.Tensor, *, dtype: torch.dtype, fused: bool) -> list[torch.Tensor]:
    """The output under autocast, and the gradients of x and of a weight of this dtype."""
    torch.manual_seed(0)
    norm = GptOssRMSNorm(x.shape[-1], eps=1e-5).to(x.device, dtype)
    torch.nn.init.normal_(norm.weight)
    if fused:
        use_fused_norms(torch.nn.ModuleList([norm]))
        assert type(norm) is FusedRMSNorm
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        y = norm(x)
    assert y.dtype is x.dtype
    y.backward(torch.linspace(-1, 1, y.numel(), device=x.device).view_as(y).to(y.dtype))
    assert x.grad is not None and norm.weight.grad is not None
    return [y.detach(), x.grad, norm.weight.grad]


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_is_transformers_own(device: str, dtype: torch.dtype, weight: torch.dtype) -> None:
    x = torch.randn(3, 37, 288, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    expected = norm_of(x, dtype=weight, fused=False)
    actual = norm_of(x, dtype=weight, fused=True)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype is theirs.dtype
        # Where both are in bf16, a rounding to the other neighbour is the most that may differ.
        tolerance = 2**-7 if torch.bfloat16 in (dtype, weight) else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_every_number_is_the_same_in_bf16() -> None:
    x = torch.randn(3, 37, 288, generator=torch.Generator().manual_seed(1)).bfloat16()
    pair = [norm_of(x, dtype=torch.bfloat16, fused=fused)[:2] for fused in (False, True)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*pair, strict=True))
