"""Our rotary embedding is transformers' own, in its outputs and its gradients."""

from typing import Any

import pytest
import torch
from transformers import GptOssConfig
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

from finetune.model import rotary, rotary_kernel
from finetune.model.rotary import apply_rotary_pos_emb, probe, use_fused_rotary
from helpers.interpreter import (
    DEVICE,
    ON_GPU,
    assert_passes_in_interpreter,
    runs_kernels,
    starts_interpreter,
)
from helpers.tensors import assert_same

SHAPES = [(1, 1, 4, 2, 8), (2, 37, 64, 8, 64), (2, 5, 3, 1, 12)]  # B, T, Hq, Hk, D


@starts_interpreter
def test_what_runs_the_kernel_passes_in_tritons_interpreter() -> None:
    assert_passes_in_interpreter(__file__)


def by_transformers(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> list[torch.Tensor]:
    rotate: Any = modeling_gpt_oss._apply_rotary_emb
    return [rotate(x, cos[:, None], sin[:, None]) for x in (q, k)]


@pytest.mark.parametrize("shape", SHAPES)
# The interpreter cuts off what a GPU rounds.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_outputs_and_gradients_are_transformers_own(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    num_rows, length, num_queries, num_keys, size = shape
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(DEVICE, dtype)

    # As GptOssAttention has them: tokens before heads in memory.
    q, k = (random(num_rows, length, heads, size).transpose(1, 2) for heads in shape[2:4])
    cos, sin = random(num_rows, length, size // 2), random(num_rows, length, size // 2)
    grads = random(num_rows, num_queries, length, size), random(num_rows, num_keys, length, size)
    named: list[dict[str, Any]] = []
    runs: list[tuple[Any, torch.dtype]] = [
        (apply_rotary_pos_emb, dtype),
        (by_transformers, torch.float32),
    ]
    for run, number in runs:
        leaves = [x.detach().to(number).requires_grad_() for x in (q, k)]
        results = run(*leaves, cos.to(number), sin.to(number))
        torch.autograd.backward(results, [grad.to(number) for grad in grads])
        names = ("q", "k", "the gradient of q", "the gradient of k")
        found = [x.detach() for x in results] + [leaf.grad for leaf in leaves]
        named.append(dict(zip(names, found, strict=True)))
    actual, expected = named
    assert_same(actual, expected, tolerance=tolerance)
    assert all(x.dtype is dtype for x in actual.values())
    # Flash attention wants tokens before heads.
    assert actual["q"].stride() == q.stride() and actual["k"].stride() == k.stride()


def test_an_attention_layer_rotates_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it did by transformers' own, in fp32; conversations of a packed row begin at 0 again."""
    config = GptOssConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    layer = GptOssAttention(config, layer_idx=0).to(DEVICE)
    torch.nn.init.normal_(layer.sinks)
    x = torch.randn(2, 9, 32, device=DEVICE)
    position_ids = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4], device=DEVICE).expand(2, 9)
    angles = GptOssRotaryEmbedding(config).to(DEVICE)(x, position_ids)
    monkeypatch.setattr(
        modeling_gpt_oss,
        "apply_rotary_pos_emb",
        lambda q, k, cos, sin: by_transformers(q, k, cos, sin),
    )
    expected, _ = layer(x, angles, None)
    use_fused_rotary()
    assert modeling_gpt_oss.apply_rotary_pos_emb is apply_rotary_pos_emb
    actual, _ = layer(x, angles, None)
    torch.testing.assert_close(actual, expected)


@runs_kernels
def test_the_probe_trusts_a_kernel_that_is_right() -> None:
    assert probe(DEVICE) is None


@pytest.mark.parametrize("wrong", ["it does not rotate back", "it raises"])
def test_the_probe_refuses_a_wrong_kernel_with_the_reason(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rotate(*args: torch.Tensor, backwards: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if wrong == "it raises":
            raise RuntimeError("no kernel image\nis available")
        return rotary.rotate(*args, backwards=False)

    monkeypatch.setattr(rotary_kernel, "rotate", rotate)
    refusal = probe("cpu")
    assert refusal is not None
    if wrong == "it raises":
        assert refusal == "RuntimeError: no kernel image"
    else:
        assert "it differs from its definition by " in refusal


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
def test_the_kernel_is_right_on_this_gpu() -> None:
    assert probe("cuda") is None
