"""Frozen expert weights in MXFP4, as they are published, unpacked only while they are used.

MXFP4 takes about a quarter of the memory of bf16. A block of 32 weights is stored as 16 bytes and a
scale (OCP Microscaling Formats, v1.0). Each byte holds two FP4 values (E2M1), the even one in its
low half. The scale is the exponent of a power of two, with a bias of 127. For E experts of "in"
inputs and "out" outputs:

    blocks    (E, out, in / 32, 16) uint8        scales    (E, out, in / 32) uint8
"""

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import grouped_mm

try:
    from finetune.model import fused_unpacking, kernels
except ImportError:  # a CPU build of torch comes without Triton
    fused_unpacking = kernels = None  # type: ignore[assignment]

BLOCK_SIZE = 32
# How much is unpacked at a time in forward and backward: a whole stack of 20b's experts, a quarter
# of one of 120b's. More takes memory, less makes the host wait for the router (packed_grouped_mm).
MAX_UNPACKED_BYTES = 2**30
# Whether weights are unpacked on their way into a product instead of before it. On a GPU only,
# where unpacking_probe.py has found that to be right and faster.
unpacks_in_product = False
# By code: the lowest 3 bits are the magnitude, the 4th is the sign.
FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_VALUES = FP4_MAGNITUDES + tuple(-magnitude for magnitude in FP4_MAGNITUDES)
# Of a byte, both values.
PAIRS = torch.tensor(
    [[FP4_VALUES[byte & 15], FP4_VALUES[byte >> 4]] for byte in range(256)], dtype=torch.bfloat16
)


def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weights in bf16: (E, out, in). Exact, because bf16 holds every MXFP4 value."""
    if blocks.is_cuda and kernels is not None:
        return kernels.unpack(blocks, scales)
    weights = torch.empty(*scales.shape, BLOCK_SIZE, dtype=torch.bfloat16, device=blocks.device)
    pairs = PAIRS.to(blocks.device)
    # Expert by expert: PyTorch indexes by 64-bit numbers, eight times as large as the bytes.
    for expert, (values, exponents) in enumerate(zip(blocks, scales, strict=True)):
        values = pairs[values.int()].flatten(-2)
        torch.ldexp(values, exponents.int()[..., None] - 127, out=weights[expert])
    return weights.flatten(-2)


class Mxfp4Weight(torch.Tensor):
    """A stack of expert weights that looks like a bf16 tensor (E, in, out) and is stored in MXFP4.

    A tensor subclass, so that it can be a model's parameter. `to(device)` and `detach` work on its
    blocks and scales; every other operation unpacks a copy first. In-place operations raise
    NotImplementedError, because they would change only that copy.
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
        """An unpacked bf16 copy, (E, in, out): transposed, as a view of (E, out, in)."""
        return unpack(self.blocks, self.scales).transpose(1, 2)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return Mxfp4Weight(args[0].blocks, args[0].scales)
        # .to(device) moves the packed bytes; .to(dtype) unpacks, like all other operations.
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            device = kwargs.get("device", args[0].device)
            return Mxfp4Weight(args[0].blocks.to(device), args[0].scales.to(device))
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} would change weights that are packed in MXFP4")
        args, kwargs = torch.utils._pytree.tree_map_only(Mxfp4Weight, cls.dense, (args, kwargs))
        return func(*args, **kwargs)


class PackedGroupedMM(torch.autograd.Function):
    """Multiply each row of x (S, in) by its expert's packed weight: (S, out).

    Forward and backward each unpack the weights. Saving the unpacked ones for backward would keep
    all layers' experts in bf16, and the memory that MXFP4 saves would be gone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        blocks: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
    ) -> torch.Tensor:
        # Not by save_for_backward: it would make a checkpointed layer compute this product again
        # for tensors that are there anyway, the frozen weights and one number for each expert.
        ctx.packed = blocks, scales, offsets
        return packed_grouped_mm(x, blocks, scales, offsets, transpose=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return packed_grouped_mm(grad, *ctx.packed, transpose=False), None, None, None


def packed_grouped_mm(
    x: torch.Tensor,
    blocks: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    *,
    transpose: bool,
) -> torch.Tensor:
    """Multiply each row of x by its expert's weight, at most MAX_UNPACKED_BYTES unpacked at a time.

    transpose: whether to multiply by (in, out), as in forward, or by (out, in), as in backward.
    offsets: (E,), the end of each expert's rows, as grouped_mm takes them.
    """
    if unpacks_in_product:
        return fused_unpacking.packed_grouped_mm(x, blocks, scales, offsets, transpose=transpose)
    num_experts = len(blocks)
    # A byte of a block becomes two bf16 numbers: four bytes.
    step = max(1, MAX_UNPACKED_BYTES // (4 * blocks[0].numel()))
    if step >= num_experts:
        # All experts at once. Only the device reads the offsets, so the host need not wait for it.
        weights = unpack(blocks, scales)
        return grouped_mm(x, weights.transpose(1, 2) if transpose else weights, offs=offsets)
    starts, rows = range(0, num_experts, step), bounds(offsets, step=step, num_rows=len(x))
    y = x.new_empty(len(x), blocks.shape[1] if transpose else 2 * blocks[0, 0].numel())
    for first, (start, stop) in zip(starts, pairwise(rows), strict=True):
        if start == stop:  # no token goes to these experts
            continue
        some = slice(first, first + step)
        weights = unpack(blocks[some], scales[some])
        weights = weights.transpose(1, 2) if transpose else weights
        y[start:stop] = grouped_mm(x[start:stop], weights, offs=offsets[some] - start)
    return y


def bounds(offsets: torch.Tensor, *, step: int, num_rows: int) -> list[int]:
    """The first row of every group of `step` experts, and the number of rows at the end.

    The host waits here until the device has run the router, as slices need numbers on the host.
    """
    return [0, *offsets[step - 1 : -1 : step].tolist(), num_rows]


def exclude_packed_from_ddp(model: torch.nn.Module) -> None:
    """Keep DistributedDataParallel from broadcasting the packed weights at its start.

    Every rank has read them from disk already.
    """
    model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
        name for name, parameter in model.named_parameters() if isinstance(parameter, Mxfp4Weight)
    ]
