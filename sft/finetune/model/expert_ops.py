"""What lies between the grouped GEMMs of gpt-oss's experts: dispatch, activation and sum.

Each operation is one kernel in forward and one in backward. The functions below say what it
computes, and compute it on a CPU; expert_kernels.py has the same ones for a GPU.

Two things keep the traffic low. Where LoRA adds to a result, the operation that reads the result
takes LoRA's part as a second tensor, and in backward gets a second gradient. And the router's
weight is multiplied into the activation, not into the experts' outputs: the sum of outputs then
keeps none of them for its backward, and a checkpointed layer need not compute them a second time.

Shapes: T tokens, k experts per token, S = T k pairs, E experts, D hidden size, I intermediate size.
Pair number p belongs to token p // k. Rows of S are sorted by expert: row s is pair order[s], and
pair p is row inverse[p].
"""

from collections.abc import Callable
from typing import Any

import torch

try:
    from finetune.model import expert_kernels
except ImportError:  # a CPU build of torch comes without Triton
    expert_kernels = None  # type: ignore[assignment]


class Dispatch(torch.autograd.Function):
    """Copy tokens (T, D) to their k experts: rows (S, D), twice the same, for weights and LoRA.

    The backward of plain indexing adds a token's k gradients by atomic operations, in whatever
    order they arrive, so that two runs differ. Here they are summed in a fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, top_k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.inverse, ctx.top_k = inverse, top_k
        ctx.set_materialize_grads(False)
        rows = tokens[order // top_k]
        return rows, rows.detach()

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: torch.Tensor, grad_lora: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        tokens = fused(sum_pairs, grad)(grad, grad_lora, None, ctx.inverse, ctx.top_k)
        return tokens, None, None, None


class ClampedSwiglu(torch.autograd.Function):
    """gpt-oss's activation times the router's weight: from (S, 2 I) to (S, I), twice the same.

    gate_up, and LoRA's part of it, interleave gates and ups: columns 0, 2, ... and 1, 3, .... The
    bias is (E, 2 I), the router's weights (T, k). The activation is that of GptOssExperts of
    transformers: (up + 1) * gate * sigmoid(alpha * gate), with the gate clamped to at most `limit`
    and up to -limit..limit.

    It is computed in fp32 and rounded once. Backward computes it again from the input: autograd
    would keep every intermediate result, several times the memory of gate_up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate_up: torch.Tensor,
        lora: torch.Tensor | None,
        bias: torch.Tensor,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        order: torch.Tensor,
        alpha: float,
        limit: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(gate_up, lora, bias, weights, expert_ids, order)
        ctx.alpha, ctx.limit = alpha, limit
        ctx.set_materialize_grads(False)
        activation = fused(swiglu, gate_up)
        rows = activation(gate_up, lora, bias, weights, expert_ids, order, alpha, limit)
        return rows, rows.detach()

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: torch.Tensor, grad_lora: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        gate_up, lora, bias, weights, expert_ids, order = ctx.saved_tensors
        backward = fused(swiglu_backward, gate_up)
        d_gate_up, d_weights = backward(
            grad, grad_lora, gate_up, lora, bias, weights, expert_ids, order, ctx.alpha, ctx.limit
        )
        d_lora = None if lora is None else d_gate_up
        d_bias = sum_by_expert(d_gate_up, expert_ids, bias) if ctx.needs_input_grad[2] else None
        return d_gate_up, d_lora, d_bias, d_weights, None, None, None, None


class Combine(torch.autograd.Function):
    """Sum the k rows of each token, LoRA's part of them, and `base` (T, D): (S, D) to (T, D).

    Nothing goes through save_for_backward: a checkpointed layer is computed again only up to the
    last tensor that is saved so, which lies before the experts' last grouped GEMM. order is kept
    from the first forward instead; it has 8 bytes a row, of which a hidden state has thousands.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        lora: torch.Tensor | None,
        base: torch.Tensor,
        order: torch.Tensor,
        inverse: torch.Tensor,
        top_k: int,
    ) -> torch.Tensor:
        ctx.order, ctx.top_k, ctx.has_lora = order, top_k, lora is not None
        return fused(sum_pairs, rows)(rows, lora, base, inverse, top_k)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        rows = grad[ctx.order // ctx.top_k]
        return rows, rows if ctx.has_lora else None, grad, None, None, None


def swiglu(
    gate_up: torch.Tensor,
    lora: torch.Tensor | None,
    bias: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    order: torch.Tensor,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """The forward of ClampedSwiglu: gate_up and lora (S, 2 I) -> (S, I)."""
    gate, up = gates_and_ups(gate_up, lora, bias, expert_ids)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    weight = weights.flatten()[order].float()[:, None]
    return ((up + 1) * gate * torch.sigmoid(alpha * gate) * weight).to(gate_up.dtype)


def swiglu_backward(
    grad: torch.Tensor,
    grad_lora: torch.Tensor | None,
    gate_up: torch.Tensor,
    lora: torch.Tensor | None,
    bias: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    order: torch.Tensor,
    alpha: float,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate_up (S, 2 I) and of weights (T, k), from those of both results (S, I).

    That of gate_up is also that of lora.
    """
    gate, up = gates_and_ups(gate_up, lora, bias, expert_ids)
    # A clamped value has no gradient. A value exactly at the limit has one, as with torch.clamp.
    lets_gate, lets_up = gate <= limit, (up >= -limit) & (up <= limit)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    grad = grad.float() if grad_lora is None else grad.float() + grad_lora.float()
    sigmoid = torch.sigmoid(alpha * gate)
    glu = gate * sigmoid
    d_weights = weights.new_empty(weights.numel())
    d_weights[order] = (grad * (up + 1) * glu).sum(1).to(weights.dtype)
    grad = grad * weights.flatten()[order].float()[:, None]
    d_gate = grad * (up + 1) * sigmoid * (1 + alpha * gate * (1 - sigmoid))
    d_gate_up = torch.stack((d_gate * lets_gate, grad * glu * lets_up), -1).flatten(-2)
    return d_gate_up.to(gate_up.dtype), d_weights.view_as(weights)


def gates_and_ups(
    gate_up: torch.Tensor, lora: torch.Tensor | None, bias: torch.Tensor, expert_ids: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gates (S, I) and ups (S, I) in fp32, with LoRA's part and the bias of each row's expert."""
    both = gate_up.float() if lora is None else gate_up.float() + lora.float()
    return (both + bias[expert_ids].float()).unflatten(-1, (-1, 2)).unbind(-1)


def sum_pairs(
    pairs: torch.Tensor,
    lora: torch.Tensor | None,
    base: torch.Tensor | None,
    inverse: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """For each token, the sum of its k rows of pairs (S, D) and of lora (S, D), and base (T, D)."""
    rows = pairs.float() if lora is None else pairs.float() + lora.float()
    total = rows[inverse].unflatten(0, (-1, top_k)).sum(1)
    return (total if base is None else total + base.float()).to(pairs.dtype)


def sum_by_expert(grad: torch.Tensor, expert_ids: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Sum the rows of grad (S, N) that belong to each expert: the gradient of a bias (E, N).

    A product with a matrix of zeros and ones, because it adds up in the same order in every run.
    index_add would use atomic operations.
    """
    experts = torch.arange(len(bias), device=grad.device)
    return ((expert_ids == experts[:, None]).to(grad.dtype) @ grad).to(bias.dtype)


def fused(function: Callable[..., Any], like: torch.Tensor) -> Callable[..., Any]:
    """The function as one kernel, where `like` is on a GPU."""
    if expert_kernels is not None and (like.is_cuda or expert_kernels.INTERPRETED):
        return getattr(expert_kernels, function.__name__)
    return function
