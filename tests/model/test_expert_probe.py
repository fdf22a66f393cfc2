"""Experts that compute something else than their definition are refused before training."""

from typing import Any

import pytest
import torch

from finetune.model import expert_ops
from finetune.model.expert_probe import probe


def test_experts_that_are_right_pass() -> None:
    assert probe("cpu") is None


@pytest.mark.parametrize("wrong", ["a gradient", "nan", "it raises"])
def test_a_wrong_kernel_is_refused_with_the_reason(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = expert_ops.swiglu_backward

    def swiglu_backward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if wrong == "it raises":
            raise RuntimeError("no kernel image\nis available")
        d_gate_up, d_weights = right(*args)
        if wrong == "nan":
            d_gate_up[0] = float("nan")
        return d_gate_up, d_weights * (1.2 if wrong == "a gradient" else 1.0)

    monkeypatch.setattr(expert_ops, "swiglu_backward", swiglu_backward)
    refusal = probe("cpu")
    assert refusal is not None
    if wrong == "it raises":
        assert refusal == "RuntimeError: no kernel image"
    else:
        assert "the gradient of " in refusal and "differs from fp32's by" in refusal


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_our_kernels_are_right_on_this_gpu() -> None:
    assert probe("cuda") is None
