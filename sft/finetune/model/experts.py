"""gpt-oss's experts as they are trained here: grouped GEMMs over tokens sorted by expert, what lies
between them in one kernel each way, and LoRA's factors beside the frozen weights.

Stock PEFT adds the product of the factors to the weights: a copy of every expert stack in each
forward, the full gradient of it in each backward. Here x goes through two thin grouped GEMMs:

    y = x W + s (x A) B        A: (E, in, r), B: (E, r, out), both small; W needs no gradient

S tokens-and-experts pairs, T tokens, k experts a token, E experts, D hidden, I intermediate size.
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

Factors = tuple[torch.Tensor, torch.Tensor, float]


def experts_forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """What the experts make of each token, weighted: (T, D) of hidden_states (T, D).

    self: GptOssExperts; top_k_index and top_k_weights: (T, k), from the router.
    """
    top_k = top_k_index.shape[1]
    expert_ids, order = torch.sort(top_k_index.flatten(), stable=True)
    inverse = torch.argsort(order)
    bounds = torch.arange(1, self.num_experts + 1, device=order.device)
    offsets = torch.searchsorted(expert_ids, bounds).int()  # the first pair of each next expert
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
    """Each pair's x (S, in) times its expert's weight (E, in, out), plus the low-rank part."""
    x = x.to(weight.dtype)
    if isinstance(weight, Mxfp4Weight):
        y = PackedGroupedMM.apply(x, weight.blocks, weight.scales, offsets)
    else:
        y = grouped_mm(x, weight, offs=offsets)
    if factors is None:
        return y
    a, b, scaling = factors
    # Rows of a grouped GEMM begin at multiples of 16 bytes, and PEFT's layout scatters those of b.
    # Both are small, and zeros add nothing.
    missing = -a.shape[-1] % 8
    a, b = pad(a, (0, missing)), pad(b, (0, 0, 0, missing)).contiguous()
    return y + grouped_mm(grouped_mm(x, a, offs=offsets) * scaling, b, offs=offsets)


class LowRankParamWrapper(ParamWrapper):
    """PEFT's LoRA on a stack of expert weights; its parameters and its files stay what they are."""

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Hand the factors to experts_forward, where PEFT puts their product into the weight."""
        adapters = [adapter for adapter in active_adapters if adapter in self.lora_A]
        if len(adapters) != 1:
            with super()._activate_lora(active_adapters):
                yield
            return
        experts = self.get_base_layer()
        others = getattr(experts, "lora_factors", {})
        experts.lora_factors = others | {self.parameter_name: self.get_delta_factors(adapters[0])}
        try:
            yield
        finally:
            experts.lora_factors = others


def use_grouped_lora(model: torch.nn.Module) -> None:
    """Let every LoRA on experts of a PEFT model take the low-rank path of experts_forward."""
    module: Any
    for module in model.modules():
        if type(module) is ParamWrapper and module.num_experts > 1:
            module.__class__ = LowRankParamWrapper


class Dispatch(torch.autograd.Function):
    """Tokens (T, D) copied to their k experts, in the experts' order: (S, D).

    Backward adds a token's k gradients up in a fixed order, where that of indexing adds them as
    they come.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return tokens[order // top_k]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class ClampedSwiglu(torch.autograd.Function):
    """(S, 2 I) of interleaved gates and ups, with their bias (E, 2 I), to (S, I).

    (up + 1) * gate * sigmoid(alpha * gate), the gate clamped from above and up on both sides, as in
    GptOssExperts; computed in fp32, and from the input again in backward.
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
    """The experts' outputs (S, D), with their bias (E, D), weighted and added up: (T, D)."""

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
    gate, up = (gate_up.float() + bias[expert_ids].float()).unflatten(-1, (-1, 2)).unbind(-1)
    # As torch's clamp has it, the edges themselves let the gradient through.
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
    by_expert = grad[order // weights.shape[1]].float()
    d_outputs = by_expert * weights.flatten()[order].float()[:, None]
    d_weights = (by_expert * (outputs.float() + bias[expert_ids].float())).sum(-1)
    d_weights = d_weights[inverse].view_as(weights)
    return d_outputs.to(outputs.dtype), d_weights.to(weights.dtype)


def sum_by_expert(grad: torch.Tensor, expert_ids: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Of the rows of grad (S, N), as a matrix product: (E, N), always in the same order."""
    experts = torch.arange(len(bias), device=grad.device)
    return ((expert_ids == experts[:, None]).to(grad.dtype) @ grad).to(bias.dtype)


def fused(function: Callable[..., Any], like: torch.Tensor) -> Callable[..., Any]:
    """One kernel of it where there is a GPU; elsewhere compiling takes longer than it saves."""
    return compiled(function) if like.is_cuda else function


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
