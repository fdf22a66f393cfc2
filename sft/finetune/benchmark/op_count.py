"""What a microbatch's forward and backward cost, operation by operation, counted without a GPU.

The real modules run without values (fake_model.py), at two numbers of layers; what they cost at
all layers follows, because every pair of layers, one sliding and one full, costs the same.

OpCount adds up, by part of the step:

    flops      of matrix products and attention (torch.utils.flop_counter has the formulas)
    bytes      every operand read once and every result written once, as if nothing stayed in a
               cache between two kernels; rows that are gathered count, the table they are in not
    launches   operations that start a kernel: views and empty tensors do not. Those that start
               several, as sorting does, count once
    waits      operations whose result the host has to know: it waits until the GPU is there
    seconds    the sum over all operations of the longer of both: flops over the GPU's rate, bytes
               over its bandwidth. No step can be faster on kernels of this kind.

What a count cannot know: how far a kernel stays behind its bound, what runs at the same time, and
how long the host takes for a launch.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import GptOssConfig
from trl import ModelConfig

from finetune.benchmark.fake_model import (
    ATTENTION_PART,
    EXPERTS_PART,
    GROUPED_PART,
    HEAD_PART,
    NORM_PART,
    ROTARY_PART,
    UNPACKING_PART,
    as_on_a_gpu,
    at_all_layers,
    every_row,
    few_layers,
    forward_and_backward,
    make_model,
    selects_by_mask,
    to_fake,
)
from finetune.benchmark.gpus import Gpu  # which registers the formula of grouped GEMMs as well
from finetune.model.mxfp4 import Mxfp4Weight

aten = torch.ops.aten
LORA_PART = "LoRA's thin GEMMs"
ELEMENTWISE_PART = "eager element-wise: casts, sums"
PARTS = (
    GROUPED_PART,
    UNPACKING_PART,
    EXPERTS_PART,
    HEAD_PART,
    ATTENTION_PART,
    LORA_PART,
    NORM_PART,
    ROTARY_PART,
    ELEMENTWISE_PART,
)
DENSE = (aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm)
GATHERS = (aten.index, aten.embedding, aten.gather, aten.index_select)
WRITES_ALL = (aten.copy_, aten.fill_, aten.zero_)  # in place, without reading what was there
ALLOCATES = (aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided)
WAITS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select)


@dataclass(frozen=True)
class Cost:
    """What a part of a step costs; see above."""

    flops: float = 0
    bytes: float = 0
    launches: float = 0
    waits: float = 0
    seconds: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def __sub__(self, other: "Cost") -> "Cost":
        return self + other * -1

    def __mul__(self, factor: float) -> "Cost":
        return Cost(*(getattr(self, f.name) * factor for f in fields(Cost)))


class OpCount(TorchDispatchMode):
    """The costs of all operations that are run while this is on, by part.

    rank: LoRA's, as it is in the products: a matrix that thin is one of LoRA's factors.
    """

    def __init__(self, gpu: Gpu, *, rank: int | None) -> None:
        super().__init__()
        self.gpu, self.rank = gpu, rank
        self.parts = dict.fromkeys(PARTS, Cost())
        self.is_paused = False

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if selects_by_mask(func, args):
            self.parts[HEAD_PART] += Cost(waits=1)  # the host has to know how many rows there are
            result = every_row(*args)
        else:
            result = func(*args, **kwargs)
        if self.is_paused:
            return result
        if packet in WAITS:
            self.parts[ELEMENTWISE_PART] += Cost(waits=1)
        read, written = tensors_of(args), tensors_of(result)
        is_view = shares_storage(read, written) and not func._schema.is_mutable
        if packet in ALLOCATES or is_view or not written:
            return result
        if packet in WRITES_ALL:
            read = read[1:]
        formula = flop_registry.get(aten.addmm if packet is aten.addmm_ else packet)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        size = sum(map(nbytes, written))
        read_bytes = size if packet in GATHERS else sum(map(nbytes, read))
        self.add(self.part_of(packet, read), flops=flops, size=size + read_bytes)
        return result

    def part_of(self, packet: Any, operands: list[torch.Tensor]) -> str:
        if packet is not aten._grouped_mm and packet not in DENSE:
            return ELEMENTWISE_PART
        if self.rank is not None and any(self.rank in t.shape[-2:] for t in operands if t.ndim > 1):
            return LORA_PART
        return GROUPED_PART if packet is aten._grouped_mm else HEAD_PART

    def add(self, part: str, *, flops: float, size: float) -> None:
        seconds = max(flops / self.gpu.flops, size / self.gpu.bandwidth)
        self.parts[part] += Cost(flops=flops, bytes=size, launches=1, seconds=seconds)

    def first_rows(self, num_chunks: int, num_rows: int) -> list[int]:
        """See fake_model.Counter: as many rows for each chunk, which the host waits to know."""
        self.parts[UNPACKING_PART] += Cost(waits=1)
        return [num_rows * chunk // num_chunks for chunk in range(num_chunks + 1)]

    def as_kernel(
        self, function: Callable[..., Any], *, part: str, flops: Callable[..., float] | None = None
    ) -> Callable[..., Any]:
        """See fake_model.Counter."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.is_paused = True
            results = function(*args, **kwargs)
            self.is_paused = False
            size = sum(map(nbytes, tensors_of(args) + tensors_of(results)))
            self.add(part, flops=flops(*args) if flops else 0, size=size)
            return results

        return run


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """All tensors but packed weights, which have no bytes of their own."""
    leaves = tree_leaves(tree)
    return [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, Mxfp4Weight)]


def shares_storage(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    there = {tensor.untyped_storage()._cdata for tensor in first}
    return any(tensor.untyped_storage()._cdata in there for tensor in second)


def nbytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements; those of an expanded dimension count once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * prod(size for size, stride in sizes if stride != 0)


def count_microbatch(
    config: GptOssConfig,
    lora: ModelConfig,
    gpu: Gpu,
    *,
    max_length: int,
    batch_size: int,
    packed: bool,
    context: float,
    activation_checkpointing: bool = True,
    unpacks_in_product: bool = False,
) -> dict[str, Cost]:
    """The costs of a microbatch's forward and backward on one GPU, by part.

    packed: the experts are in MXFP4. context: the mean length of a conversation in tokens.
    unpacks_in_product: whether experts are unpacked within a product or before it. Counted at few
    layers and scaled to all.
    """
    counted = []
    for few in few_layers(config):
        model = make_model(
            few, lora, context=context, activation_checkpointing=activation_checkpointing
        )
        # grouped_linear pads the rank to a multiple of 8.
        rank = -(-lora.lora_r // 8) * 8 if lora.use_peft else None
        counted.append(
            count_model(
                model,
                gpu,
                ids=(batch_size, max_length),
                rank=rank,
                packed=packed,
                unpacks_in_product=unpacks_in_product,
            )
        )
    return at_all_layers(counted, config)


def count_model(
    model: Any,
    gpu: Gpu,
    *,
    ids: tuple[int, int],
    rank: int | None,
    packed: bool,
    unpacks_in_product: bool = False,
) -> dict[str, Cost]:
    """As count_microbatch, of a model on the meta device as it is. ids: of a batch, (B, T)."""
    with FakeTensorMode():
        to_fake(model, packed=packed)
        tokens = torch.zeros(ids, dtype=torch.long)
        counted = OpCount(gpu, rank=rank)
        with counted, as_on_a_gpu(counted, unpacks_in_product=unpacks_in_product):
            forward_and_backward(model, tokens)
    return counted.parts
