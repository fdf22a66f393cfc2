"""LoRA beside a frozen linear layer: its product is added by the matrix product itself.

    y = x W + bias + s (x A) B        A: (r, in), B: (out, r), as PEFT stores them

PEFT computes x W and (x A) B as two tensors, scales one and adds both, and backward does as much
again. Each of these steps reads and writes a tensor of the layer's size, where (x A) B itself takes
hardly any time. Here s (x A) B is added while it is computed, and rounded together with the sum.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.nn.functional import linear


class LoraProduct(torch.autograd.Function):
    """x (..., in), weight (out, in), bias (out,) or None, a (r, in), b (out, r): (..., out).

    All in one dtype. weight and bias are frozen.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.flatten(0, -2)
        thin = rows @ a.T
        y = linear(rows, weight, bias).addmm_(thin, b.T, alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, thin)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, a, b, thin = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        d_thin = (grad @ b) * ctx.scaling
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (grad @ weight).addmm_(d_thin, a).view_as(x)
        return d_x, None, None, d_thin.T @ x.flatten(0, -2), (grad.T @ thin) * ctx.scaling, None


class LowRankLinear(Linear):
    """PEFT's LoRA on a linear layer. Parameters, their names and the saved files stay the same."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapters = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        if args or kwargs or len(adapters) != 1 or not self.is_plain(adapters[0], x):
            return super().forward(x, *args, **kwargs)
        (adapter,) = adapters
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        base = self.base_layer
        a, b = a.to(x.dtype), b.to(x.dtype)  # autocast would do so; each has a copy in x's dtype
        return LoraProduct.apply(x, base.weight, base.bias, a, b, self.scaling[adapter])

    def is_plain(self, adapter: str, x: torch.Tensor) -> bool:
        """Whether PEFT would compute no more than LoraProduct, and in the dtype of x."""
        base, b = self.base_layer, self.lora_B[adapter]
        is_frozen = not any(parameter.requires_grad for parameter in base.parameters())
        # DeepSpeed gathers a weight when its module is called, and here none of them is.
        is_here = not hasattr(base.weight, "ds_id")
        device = x.device.type
        is_autocast = torch.is_autocast_enabled(device)
        computed = torch.get_autocast_dtype(device) if is_autocast else b.weight.dtype
        return (
            not self.disable_adapters
            and not self.merged
            and adapter not in self.lora_variant
            and isinstance(self.lora_dropout[adapter], torch.nn.Identity)
            and b.bias is None
            and is_frozen
            and is_here
            and x.dtype == base.weight.dtype == computed
        )


def use_low_rank_linears(model: torch.nn.Module) -> None:
    """Switch every LoRA on a linear layer of a PEFT model to LoraProduct.

    PEFT makes the layers itself, so their class is changed afterwards.
    """
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is torch.nn.Linear:
            module.__class__ = LowRankLinear
