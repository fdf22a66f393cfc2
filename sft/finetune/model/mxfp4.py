"""Frozen expert weights as they are published: MXFP4, a quarter of bf16, unpacked while used.

A block of 32 weights is 16 bytes of FP4 values (E2M1, the even one in the low half of a byte) and a
scale, the exponent of a power of two with bias 127 (OCP Microscaling Formats, v1.0). E experts, of
"in" inputs and "out" outputs:

    blocks    (E, out, in / 32, 16) uint8        scales    (E, out, in / 32) uint8
"""

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import grouped_mm

try:
    from finetune.model import kernels as mxfp4_triton
except ImportError:  # a CPU build of torch brings no Triton
    mxfp4_triton = None  # type: ignore[assignment]

BLOCK_SIZE = 32
# A stack of 20b's experts at once, a quarter of one of 120b's.
MAX_UNPACKED_BYTES = 2**30
FP4_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
# Of a byte, both values.
PAIRS = torch.tensor(
    [[FP4_VALUES[byte & 15], FP4_VALUES[byte >> 4]] for byte in range(256)], dtype=torch.bfloat16
)


def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights in bf16, exactly: (E, out, in)."""
    if blocks.is_cuda and mxfp4_triton is not None:
        return mxfp4_triton.unpack(blocks, scales)
    weights = torch.empty(*scales.shape, BLOCK_SIZE, dtype=torch.bfloat16, device=blocks.device)
    pairs = PAIRS.to(blocks.device)
    # Expert by expert: indices are eight times as large as the bytes.
    for expert, (values, exponents) in enumerate(zip(blocks, scales, strict=True)):
        values = pairs[values.int()].flatten(-2)
        torch.ldexp(values, exponents.int()[..., None] - 127, out=weights[expert])
    return weights.flatten(-2)


class Mxfp4Weight(torch.Tensor):
    """A stack of expert weights (E, in, out), bf16 to whoever looks, that holds blocks and scales.

    Operations that have no packed form unpack it first; those that would change it are refused.
    """

    blocks: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def __new__(cls, blocks: torch.Tensor, scales: torch.Tensor) -> "Mxfp4Weight":
        num_experts, out, groups, _ = blocks.shape
        return torch.Tensor._make_wrapper_subclass(
            cls,
            (num_experts, groups * BLOCK_SIZE, out),
            dtype=torch.bfloat16,
            device=blocks.device,
        )

    def __init__(self, blocks: torch.Tensor, scales: torch.Tensor) -> None:
        self.blocks, self.scales = blocks, scales

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"Mxfp4Weight({tuple(self.shape)}, device={self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["blocks", "scales"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, torch.Tensor], *others: Any) -> "Mxfp4Weight":
        return Mxfp4Weight(tensors["blocks"], tensors["scales"])

    def dense(self) -> torch.Tensor:
        """A bf16 copy: (E, in, out)."""
        return unpack(self.blocks, self.scales).transpose(1, 2)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return Mxfp4Weight(args[0].blocks, args[0].scales)
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            device = kwargs.get("device", args[0].device)
            return Mxfp4Weight(args[0].blocks.to(device), args[0].scales.to(device))
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} would change weights that are packed in MXFP4")
        args, kwargs = torch.utils._pytree.tree_map_only(Mxfp4Weight, cls.dense, (args, kwargs))
        return func(*args, **kwargs)


class PackedGroupedMM(torch.autograd.Function):
    """Rows x (S, in), each times its expert's weights: (S, out).

    Forward and backward unpack; neither saves what it unpacked.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        blocks: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(blocks, scales, offsets)
        return packed_grouped_mm(x, blocks, scales, offsets, transpose=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return packed_grouped_mm(grad, *ctx.saved_tensors, transpose=False), None, None, None


def packed_grouped_mm(
    x: torch.Tensor,
    blocks: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    *,
    transpose: bool,
) -> torch.Tensor:
    """Rows x times their expert's weights (out, in) or, transposed, (in, out), as many experts
    unpacked at a time as MAX_UNPACKED_BYTES holds. offsets: (E,), as for grouped_mm.
    """
    num_experts = len(blocks)
    step = max(1, MAX_UNPACKED_BYTES // (4 * blocks[0].numel()))
    if step >= num_experts:
        # All at once, and the host need not wait for the router.
        weights = unpack(blocks, scales)
        return grouped_mm(x, weights.transpose(1, 2) if transpose else weights, offs=offsets)
    starts, rows = range(0, num_experts, step), bounds(offsets, step=step, num_rows=len(x))
    y = x.new_empty(len(x), blocks.shape[1] if transpose else 2 * blocks[0, 0].numel())
    for first, (start, stop) in zip(starts, pairwise(rows), strict=True):
        if start == stop:
            continue
        some = slice(first, first + step)
        weights = unpack(blocks[some], scales[some])
        weights = weights.transpose(1, 2) if transpose else weights
        y[start:stop] = grouped_mm(x[start:stop], weights, offs=offsets[some] - start)
    return y


def bounds(offsets: torch.Tensor, *, step: int, num_rows: int) -> list[int]:
    """The first row of every `step` experts, and the end. The host waits for the router here."""
    return [0, *offsets[step - 1 : -1 : step].tolist(), num_rows]


def exclude_packed_from_ddp(model: torch.nn.Module) -> None:
    """Keep DistributedDataParallel from sending packed weights around: every rank has read them."""
    model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
        name for name, parameter in model.named_parameters() if isinstance(parameter, Mxfp4Weight)
    ]
