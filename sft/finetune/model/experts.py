"""gpt-oss's experts for training: one grouped GEMM for all experts, and LoRA beside frozen weights.

Each token goes to k experts. The (token, expert) pairs are sorted by expert, so that every expert's
rows lie together and one grouped GEMM multiplies all of them. What lies around the two GEMMs is in
expert_ops.py.

Stock PEFT adds the product of LoRA's factors to the weights. That makes a copy of every stack of
experts in each forward, and the gradient of the whole stack in each backward. Here x goes through
two thin grouped GEMMs instead, and the frozen weight W needs no gradient:

    y = x W + s (x A) B        A: (E, in, r), B: (E, r, out)

The k copies of a token and what is computed from them take ten times the memory of the token. Many
tokens, such as one conversation of 131,072, therefore go through the experts in tiles, each a
checkpoint of its own: in backward too, what is kept is that of one tile.

Shapes: T tokens, k experts per token, S = T k pairs, E experts, D hidden size, I intermediate size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch.nn.functional import grouped_mm, pad
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from finetune.model.expert_ops import ClampedSwiglu, Combine, Dispatch
from finetune.model.mxfp4 import Mxfp4Weight, PackedGroupedMM

EXPERTS_IMPLEMENTATION = "sorted_grouped_mm"  # the name of experts_forward in a model's config

# Tokens of a tile. More than the recipes have at once, 4 rows of 4,096, since all but the last
# tile are computed once more than a checkpointed layer is.
TILE = 16_384

# LoRA's A (E, in, r), its B (E, r, out), and the scaling s of their product.
Factors = tuple[torch.Tensor, torch.Tensor, float]
NO_LORA = (None, None, 0.0)


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
    lora: dict[str, Factors] = getattr(self, "lora_factors", {})
    # One after the other, because a checkpoint keeps for backward what is in a dict.
    factors = *lora.get("gate_up_proj", NO_LORA), *lora.get("down_proj", NO_LORA)
    routed = hidden_states, top_k_index, top_k_weights
    if len(hidden_states) <= TILE:
        return experts_of_tile(self, *routed, *factors)
    tiles = zip(*(tensor.split(TILE) for tensor in routed), strict=True)
    return torch.cat(
        [
            checkpoint(
                experts_of_tile,
                self,
                *tile,
                *factors,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in it is random
            )
            for tile in tiles
        ]
    )


def experts_of_tile(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *factors: Any,
) -> torch.Tensor:
    """As experts_forward, at once. factors: LoRA's of both projections, or NO_LORA."""
    up_factors, down_factors = factors[:3], factors[3:]
    top_k = top_k_index.shape[1]
    # Stable, so that pairs of one expert stay in the order of their tokens: the sums over them are
    # then the same in every run.
    expert_ids, order = torch.sort(top_k_index.flatten(), stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    # offsets (E,): where the pairs of each expert end, as grouped_mm takes it. Found on the device:
    # a count that the host has to read would make it wait for the router in every layer.
    bounds = torch.arange(1, self.num_experts + 1, device=order.device)
    offsets = torch.searchsorted(expert_ids, bounds).int()
    # In fp32, because the gradient of a weight is the sum of two, which would be rounded each.
    weights = top_k_weights.float()
    # (T, E), zero where a token does not go: the weighted biases of a token's experts are a product
    # with it. What is computed here, before the GEMMs, a checkpointed layer computes again.
    routing = weights.new_zeros(len(weights), self.num_experts).scatter(1, top_k_index, weights)
    biases = routing.to(self.down_proj_bias.dtype) @ self.down_proj_bias

    x, x_lora = Dispatch.apply(hidden_states.to(self.gate_up_proj.dtype), order, inverse, top_k)
    y, y_lora = grouped_linear(x, x_lora, self.gate_up_proj, offsets, up_factors)
    bias, alpha, limit = self.gate_up_proj_bias, self.alpha, self.limit
    x, x_lora = ClampedSwiglu.apply(y, y_lora, bias, weights, expert_ids, order, alpha, limit)
    y, y_lora = grouped_linear(x, x_lora, self.down_proj, offsets, down_factors)
    return Combine.apply(y, y_lora, biases, order, inverse, top_k)


def register_experts() -> None:
    """Let a GptOssConfig name experts_forward as its experts_implementation."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, experts_forward)


def grouped_linear(
    x: torch.Tensor,
    x_lora: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    factors: Factors | tuple[None, None, float],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Multiply each row of x (S, in) by its expert's weight (E, in, out), and by LoRA's factors.

    x_lora: the same rows, for LoRA. offsets: (E,) int32, the end of each expert's rows. Returns
    both products (S, out), or None for LoRA's; what comes next adds them up.
    """
    # The weight comes last. It saves nothing that depends on the layer's input, so a checkpointed
    # layer is not computed again beyond what LoRA saves (expert_ops.Combine).
    a, b, scaling = factors
    lora = None if a is None or b is None else grouped_lora(x_lora, offsets, a, b, scaling)
    if isinstance(weight, Mxfp4Weight):
        return PackedGroupedMM.apply(x, weight.blocks, weight.scales, offsets), lora
    return grouped_mm(x, weight, offs=offsets), lora


def grouped_lora(
    x: torch.Tensor, offsets: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Multiply each row of x (S, in) by its expert's A (E, in, r) and B (E, r, out): (S, out)."""
    # grouped_mm wants every row to begin at a multiple of 16 bytes: 8 numbers in bf16. So the rank
    # is padded with zeros, which add nothing to the product. PEFT stores B with the expert as its
    # fastest dimension, so its rows are not contiguous. Both factors are small: copies are cheap.
    missing = -a.shape[-1] % 8
    a, b = pad(a, (0, missing)), pad(b, (0, 0, 0, missing)).contiguous()
    return grouped_mm(grouped_mm(x, a, offs=offsets) * scaling, b, offs=offsets)


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
