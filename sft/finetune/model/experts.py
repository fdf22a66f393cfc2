"""gpt-oss's experts for training: one grouped GEMM for all experts, and LoRA beside frozen weights.

Each token goes to k experts. The (token, expert) pairs are sorted by expert, so that every expert's
rows lie together and one grouped GEMM multiplies all of them. What lies between the two GEMMs, the
biases and the activation, is one fused kernel in forward and one in backward.

Stock PEFT adds the product of LoRA's factors to the weights. That makes a copy of every stack of
experts in each forward, and the gradient of the whole stack in each backward. Here x goes through
two thin grouped GEMMs instead, and the frozen weight W needs no gradient:

    y = x W + s (x A) B        A: (E, in, r), B: (E, r, out)

Shapes: T tokens, k experts per token, S = T k pairs, E experts, D hidden size, I intermediate size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch.nn.functional import grouped_mm, pad
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from finetune.model.mxfp4 import Mxfp4Weight, PackedGroupedMM

EXPERTS_IMPLEMENTATION = "sorted_grouped_mm"  # the name of experts_forward in a model's config

# LoRA's A (E, in, r), its B (E, r, out), and the scaling s of their product.
Factors = tuple[torch.Tensor, torch.Tensor, float]


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Send each token of hidden_states (T, D) through its experts; return the weighted sums (T, D).

    self: a GptOssExperts. top_k_index, top_k_weights: (T, k), the experts that the router chose for
    each token, and their weights.
    """
    top_k = top_k_index.shape[1]
    # Stable, so that pairs of one expert stay in the order of their tokens: the sums over them are
    # then the same in every run.
    expert_ids, order = torch.sort(top_k_index.flatten(), stable=True)
    inverse = torch.argsort(order)
    # offsets (E,): where the pairs of each expert end, as grouped_mm takes it. Found on the device:
    # a count that the host has to read would make it wait for the router in every layer.
    bounds = torch.arange(1, self.num_experts + 1, device=order.device)
    offsets = torch.searchsorted(expert_ids, bounds).int()
    lora: dict[str, Factors] = getattr(self, "lora_factors", {})

    x = Dispatch.apply(hidden_states, order, inverse, top_k)
    gate_up = grouped_linear(x, self.gate_up_proj, offsets, lora.get("gate_up_proj"))
    x = ClampedSwiglu.apply(gate_up, self.gate_up_proj_bias, expert_ids, self.alpha, self.limit)
    x = grouped_linear(x, self.down_proj, offsets, lora.get("down_proj"))
    return Combine.apply(x, self.down_proj_bias, top_k_weights, expert_ids, order, inverse)


def register_experts() -> None:
    """Let a GptOssConfig name experts_forward as its experts_implementation."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, factors: Factors | None
) -> torch.Tensor:
    """Multiply each row of x (S, in) by its expert's weight (E, in, out), and add LoRA's part.

    offsets: (E,) int32, the end of each expert's rows. Returns (S, out) in the weight's dtype.
    """
    x = x.to(weight.dtype)
    if isinstance(weight, Mxfp4Weight):
        y = PackedGroupedMM.apply(x, weight.blocks, weight.scales, offsets)
    else:
        y = grouped_mm(x, weight, offs=offsets)
    if factors is None:
        return y
    a, b, scaling = factors
    # grouped_mm wants every row to begin at a multiple of 16 bytes: 8 numbers in bf16. So the rank
    # is padded with zeros, which add nothing to the product. PEFT stores B with the expert as its
    # fastest dimension, so its rows are not contiguous. Both factors are small: copies are cheap.
    missing = -a.shape[-1] % 8
    a, b = pad(a, (0, missing)), pad(b, (0, 0, 0, missing)).contiguous()
    return y + grouped_mm(grouped_mm(x, a, offs=offsets) * scaling, b, offs=offsets)


class LowRankParamWrapper(ParamWrapper):
    """PEFT's LoRA on a stack of experts, which leaves the multiplication to experts_forward.

    Parameters, their names and the saved files stay PEFT's own.
    """

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Leave the factors where experts_forward finds them, for the time of one forward.

        PEFT's own method replaces the weight by the sum of the weight and the product.
        """
        adapters = [adapter for adapter in active_adapters if adapter in self.lora_A]
        if len(adapters) != 1:
            with super()._activate_lora(active_adapters):
                yield
            return
        # One parameter's wrapper encloses the other's: its factors may be there already.
        experts = self.get_base_layer()
        others = getattr(experts, "lora_factors", {})
        experts.lora_factors = others | {self.parameter_name: self.get_delta_factors(adapters[0])}
        try:
            yield
        finally:
            experts.lora_factors = others


def use_grouped_lora(model: torch.nn.Module) -> None:
    """Switch every LoRA on experts of a PEFT model to the low-rank path of experts_forward.

    PEFT makes the wrappers itself, so their class is changed afterwards.
    """
    module: Any
    for module in model.modules():
        if type(module) is ParamWrapper and module.num_experts > 1:
            module.__class__ = LowRankParamWrapper


class Dispatch(torch.autograd.Function):
    """Copy tokens (T, D) to their k experts: rows (S, D), sorted by expert.

    The backward of plain indexing adds a token's k gradients by atomic operations, in whatever
    order they arrive, so that two runs differ. Here they are gathered and summed in a fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return tokens[order // top_k]  # pair number p belongs to token p // k

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class ClampedSwiglu(torch.autograd.Function):
    """gpt-oss's activation, from (S, 2 I) to (S, I), as GptOssExperts of transformers has it.

    gate_up interleaves gates and ups: columns 0, 2, ... and 1, 3, .... Its bias is (E, 2 I). The
    result is (up + 1) * gate * sigmoid(alpha * gate), with the gate clamped to at most `limit` and
    up to -limit..limit.

    It is computed in fp32 and rounded once. Backward computes it again from the input: autograd
    would keep every intermediate result, several times the memory of gate_up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate_up: torch.Tensor,
        bias: torch.Tensor,
        expert_ids: torch.Tensor,
        alpha: float,
        limit: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(gate_up, bias, expert_ids)
        ctx.alpha, ctx.limit = alpha, limit
        return fused(swiglu, gate_up)(gate_up, bias, expert_ids, alpha, limit)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_up, bias, expert_ids = ctx.saved_tensors
        backward = fused(swiglu_backward, gate_up)
        d_gate_up = backward(grad, gate_up, bias, expert_ids, ctx.alpha, ctx.limit)
        d_bias = sum_by_expert(d_gate_up, expert_ids, bias) if ctx.needs_input_grad[1] else None
        return d_gate_up, d_bias, None, None, None


class Combine(torch.autograd.Function):
    """Add the bias (E, D) to the experts' outputs (S, D), and sum each token's k, weighted: (T, D).

    As above: in fp32, in a fixed order, and computed again in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        outputs: torch.Tensor,
        bias: torch.Tensor,
        weights: torch.Tensor,
        expert_ids: torch.Tensor,
        order: torch.Tensor,
        inverse: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(outputs, bias, weights, expert_ids, order, inverse)
        return fused(combine, outputs)(outputs, bias, weights, expert_ids, inverse)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        outputs, bias, weights, expert_ids, order, inverse = ctx.saved_tensors
        backward = fused(combine_backward, outputs)
        d_outputs, d_weights = backward(grad, outputs, bias, weights, expert_ids, order, inverse)
        d_bias = sum_by_expert(d_outputs, expert_ids, bias) if ctx.needs_input_grad[1] else None
        return d_outputs, d_bias, d_weights, None, None, None


def swiglu(
    gate_up: torch.Tensor,
    bias: torch.Tensor,
    expert_ids: torch.Tensor,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """The forward of ClampedSwiglu: gate_up (S, 2 I), bias (E, 2 I), expert_ids (S,) -> (S, I)."""
    gate, up = (gate_up.float() + bias[expert_ids].float()).unflatten(-1, (-1, 2)).unbind(-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * torch.sigmoid(alpha * gate)).to(gate_up.dtype)


def swiglu_backward(
    grad: torch.Tensor,
    gate_up: torch.Tensor,
    bias: torch.Tensor,
    expert_ids: torch.Tensor,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """The gradient of gate_up (S, 2 I), from that of the result (S, I)."""
    gate, up = (gate_up.float() + bias[expert_ids].float()).unflatten(-1, (-1, 2)).unbind(-1)
    # A clamped value has no gradient. A value exactly at the limit has one, as with torch.clamp.
    lets_gate, lets_up = gate <= limit, (up >= -limit) & (up <= limit)
    gate, up, grad = gate.clamp(max=limit), up.clamp(-limit, limit), grad.float()
    sigmoid = torch.sigmoid(alpha * gate)
    d_gate = grad * (up + 1) * sigmoid * (1 + alpha * gate * (1 - sigmoid))
    d_up = grad * gate * sigmoid
    return torch.stack((d_gate * lets_gate, d_up * lets_up), -1).flatten(-2).to(gate_up.dtype)


def combine(
    outputs: torch.Tensor,
    bias: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    inverse: torch.Tensor,
) -> torch.Tensor:
    """The forward of Combine: outputs (S, D), bias (E, D), weights (T, k) -> (T, D)."""
    by_token = (outputs[inverse].float() + bias[expert_ids[inverse]].float()).view(
        *weights.shape, -1
    )
    return (by_token * weights.float()[..., None]).sum(1).to(outputs.dtype)


def combine_backward(
    grad: torch.Tensor,
    outputs: torch.Tensor,
    bias: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    order: torch.Tensor,
    inverse: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of outputs (S, D) and of weights (T, k), from that of the result (T, D)."""
    by_expert = grad[order // weights.shape[1]].float()
    d_outputs = by_expert * weights.flatten()[order].float()[:, None]
    d_weights = (by_expert * (outputs.float() + bias[expert_ids].float())).sum(-1)
    d_weights = d_weights[inverse].view_as(weights)
    return d_outputs.to(outputs.dtype), d_weights.to(weights.dtype)


def sum_by_expert(grad: torch.Tensor, expert_ids: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Sum the rows of grad (S, N) that belong to each expert: the gradient of a bias (E, N).

    A product with a matrix of zeros and ones, because it adds up in the same order in every run.
    index_add would use atomic operations.
    """
    experts = torch.arange(len(bias), device=grad.device)
    return ((expert_ids == experts[:, None]).to(grad.dtype) @ grad).to(bias.dtype)


def fused(function: Callable[..., Any], like: torch.Tensor) -> Callable[..., Any]:
    """The function as one compiled kernel on a GPU; on a CPU compiling costs more than it saves."""
    return compiled(function) if like.is_cuda else function


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # dynamic, because the number of tokens differs from batch to batch: else each compiles anew.
    return torch.compile(function, dynamic=True)
