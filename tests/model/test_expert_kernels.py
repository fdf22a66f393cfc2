"""The experts' kernels compute what autograd computes.

Without a GPU Triton's interpreter runs what is marked `runs_kernels`, and some of test_experts.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.model import expert_kernels
from finetune.model.expert_ops import ClampedSwiglu, sum_pairs
from helpers.interpreter import (
    DEVICE,
    assert_passes_in_interpreter,
    runs_kernels,
    starts_interpreter,
)
from helpers.tensors import assert_same

ALPHA, LIMIT = 1.702, 7.0
TOP_K, NUM_EXPERTS = 2, 5


@starts_interpreter
def test_what_runs_the_kernels_passes_in_tritons_interpreter() -> None:
    """The experts as a whole too: of one token, and with experts that no token goes to."""
    folder = Path(__file__).parent
    files = [str(folder / name) for name in ("test_expert_kernels.py", "test_experts.py")]
    chosen = "autograd or of_each_token or shape1 or without_any_token"
    assert_passes_in_interpreter(*files, "-k", chosen)


def swiglu_by_definition(
    gate_up: torch.Tensor, bias: torch.Tensor, weights: torch.Tensor, expert_ids: torch.Tensor
) -> torch.Tensor:
    """gpt-oss's activation as GptOssExperts of transformers writes it, times weights (S,)."""
    gate_up = gate_up + bias[expert_ids]
    gate, up = gate_up[:, ::2].clamp(max=LIMIT), gate_up[:, 1::2].clamp(-LIMIT, LIMIT)
    return (up + 1) * gate * torch.sigmoid(gate * ALPHA) * weights[:, None]


@runs_kernels
# bf16 has 8 bits of precision, and the interpreter cuts off the others where a GPU rounds.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("has_lora", [False, True])
# Less and more than a program's columns, and no multiple of the 8 that a thread handles.
@pytest.mark.parametrize("intermediate", [45, 1030])
def test_swiglu_and_its_gradients_are_autograds(
    intermediate: int, has_lora: bool, dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(intermediate)

    def random(*shape: int, std: float = 1.0) -> torch.Tensor:
        values = std * torch.randn(*shape, generator=generator)
        return values.to(DEVICE, dtype).requires_grad_()

    num_rows = 6  # of experts 1, 3 and 4: the first and one between get none
    expert_ids = torch.tensor([1, 1, 3, 3, 3, 4], device=DEVICE)
    order = torch.tensor([4, 0, 5, 2, 1, 3], device=DEVICE)
    gate_up, bias = random(num_rows, 2 * intermediate, std=5.0), random(5, 2 * intermediate)
    lora = random(num_rows, 2 * intermediate) if has_lora else None
    weights = random(num_rows // TOP_K, TOP_K)
    leaves = {"gate_up": gate_up, "bias": bias, "weights": weights}
    if lora is not None:
        leaves["lora"] = lora

    rows = ClampedSwiglu.apply(gate_up, lora, bias, weights, expert_ids, order, ALPHA, LIMIT)
    grads = [random(num_rows, intermediate).detach() for _ in rows]
    sum((row * grad).sum() for row, grad in zip(rows, grads, strict=True)).backward()
    actual: dict[str, Any] = {name: leaf.grad for name, leaf in leaves.items()}

    exact = {name: leaf.detach().float().requires_grad_() for name, leaf in leaves.items()}
    total = exact["gate_up"] + exact["lora"] if has_lora else exact["gate_up"]
    sorted_weights = exact["weights"].flatten()[order]
    expected = swiglu_by_definition(total, exact["bias"], sorted_weights, expert_ids)
    (expected * (grads[0].float() + grads[1].float())).sum().backward()
    named: dict[str, Any] = {name: leaf.grad for name, leaf in exact.items()}
    assert_same(actual | {"rows": rows[0]}, named | {"rows": expected}, tolerance=tolerance)
    assert torch.equal(rows[0], rows[1])


@runs_kernels
@pytest.mark.parametrize("has_lora, has_base", [(False, False), (True, True)])
@pytest.mark.parametrize("num_tokens, width", [(1, 8), (19, 70)])
def test_the_sum_of_each_tokens_rows_equals_indexing(
    num_tokens: int, width: int, has_lora: bool, has_base: bool
) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    num_rows = num_tokens * TOP_K
    pairs, lora = torch.randn(2, num_rows, width, generator=generator).to(DEVICE)
    base = torch.randn(num_tokens, width, generator=generator).to(DEVICE)
    inverse = torch.randperm(num_rows, generator=generator).to(DEVICE)
    args = pairs, lora if has_lora else None, base if has_base else None, inverse, TOP_K
    actual = expert_kernels.sum_pairs(*args)
    expected = torch.zeros_like(base) + (base if has_base else 0)
    for pair in range(num_rows):
        row = inverse[pair]
        expected[pair // TOP_K] += pairs[row] + (lora[row] if has_lora else 0)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(sum_pairs(*args), expected)
