"""Bytes that a training step of LoRA holds, counted without a GPU and without the bytes.

The model in its true shapes, grouped LoRA, TRL's loss and AdamW run without values
(fake_model.py). LiveBytes counts each tensor from the operation that makes it until it is freed.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import GptOssConfig
from trl import ModelConfig

from finetune.benchmark.fake_model import (
    as_on_a_gpu,
    at_all_layers,
    every_row,
    few_layers,
    forward_and_backward,
    make_model,
    selects_by_mask,
    to_fake,
)
from finetune.benchmark.synthetic import MEAN_LENGTH
from finetune.model.mxfp4 import Mxfp4Weight


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations have made and that are not freed yet: now, and the peak.

    The parameters of `model` are not counted: they are there before.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.is_paused = False
        # By the address of each storage, which views of a tensor share. The parameters' storages
        # are kept alive here, so that no later storage is given one of their addresses.
        self.there = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage()
            for tensor in chain.from_iterable(map(stored, model.parameters()))
        }
        self.sizes: dict[int, int] = {}
        self.ends: dict[int, Any] = {}

    def __enter__(self) -> "LiveBytes":
        # FSDP2 frees a gathered weight by resizing its storage to nothing.
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self.sizes:
                self.change(storage._cdata, size)
            return result

        self.resizing = patch.object(torch.UntypedStorage, "resize_", resize_and_count)
        self.resizing.start()
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self.resizing.stop()

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # a sharded tensor: the operation on this rank's part follows
        result = every_row(*args) if selects_by_mask(func, args) else func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # A packed weight has no storage of its own: its blocks and scales are parameters.
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, Mxfp4Weight):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes or key in self.there or self.is_paused:
            return

        def free(_: Any) -> None:
            self.change(key, 0)
            del self.sizes[key], self.ends[key]

        self.sizes[key], self.ends[key] = 0, weakref.ref(storage, free)
        self.change(key, storage.nbytes())

    def change(self, key: int, size: int) -> None:
        """A storage has this size from now on."""
        self.now += size - self.sizes[key]
        self.sizes[key] = size
        self.peak = max(self.peak, self.now)

    def first_rows(self, num_chunks: int, num_rows: int) -> list[int]:
        """As if every token went to the first experts, where the largest GEMM is the largest."""
        return [0] + [num_rows] * num_chunks

    def as_kernel(self, function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        """The function as one kernel: its results are counted, its intermediate tensors are not."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.is_paused = True
            results = function(*args, **kwargs)
            self.is_paused = False
            # A clone is new, and is counted. What is written in place is there already.
            there = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
            return tree_map(
                lambda t: t if t is None or t.untyped_storage()._cdata in there else t.clone(),
                results,
            )

        return run


def offloaded(live: LiveBytes) -> saved_tensors_hooks:
    """What autograd saves takes no bytes until backward asks for it: the host holds it.

    As TRL's OffloadActivations, parameters and what is smaller than 1 KiB stay. TRL's copies end a
    little after the operation, so in forward up to five of them are there for longer than counted.
    """

    def pack(tensor: torch.Tensor) -> Any:
        stays = tensor.untyped_storage()._cdata in live.there or tensor.nbytes < 1024
        return tensor if stays else (tensor.shape, tensor.stride(), tensor.dtype)

    def unpack(saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        shape, stride, dtype = saved
        return torch.empty_strided(shape, stride, dtype=dtype)

    return saved_tensors_hooks(pack, unpack)


def stored(parameter: Any) -> list[torch.Tensor]:
    """The tensors that hold the bytes of a parameter."""
    if isinstance(parameter, Mxfp4Weight):
        return [parameter.blocks, parameter.scales]
    return [parameter.to_local() if isinstance(parameter, DTensor) else parameter]


def count(
    config: GptOssConfig,
    lora: ModelConfig,
    *,
    max_length: int,
    batch_size: int,
    packed: bool,
    activation_checkpointing: bool = True,
    activation_offloading: bool = False,
) -> dict[str, int]:
    """Bytes at the peak of a step, by what they hold. packed: the experts are in MXFP4.

    Counted at few layers and scaled to all: the peak is in the backward of the last layer, and
    each layer below it adds the same.
    """
    counted = [
        count_layers(
            few,
            lora,
            ids=(batch_size, max_length),
            packed=packed,
            activation_checkpointing=activation_checkpointing,
            activation_offloading=activation_offloading,
        )
        for few in few_layers(config)
    ]
    return {name: round(size) for name, size in at_all_layers(counted, config).items()}


def count_layers(
    config: GptOssConfig,
    lora: ModelConfig,
    *,
    ids: tuple[int, int],
    packed: bool,
    activation_checkpointing: bool,
    activation_offloading: bool = False,
) -> dict[str, int]:
    """As count, of a model as it is. ids: the shape of a batch of tokens, (B, T)."""
    model = make_model(
        config, lora, context=MEAN_LENGTH, activation_checkpointing=activation_checkpointing
    )
    with FakeTensorMode():
        to_fake(model, packed=packed)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        tokens = torch.zeros(ids, dtype=torch.long)
        live = LiveBytes(model)
        with live, as_on_a_gpu(live):
            for _ in range(2):  # in the second step gradients and AdamW's states are there as well
                with offloaded(live) if activation_offloading else nullcontext():
                    forward_and_backward(model, tokens)
                optimizer.step()

    stacks = sum(t.nbytes for p in model.parameters() if p.ndim == 3 for t in stored(p))
    adapter = sum(parameter.nbytes for parameter in trained)
    others = sum(p.nbytes for p in model.parameters() if p.ndim != 3) - adapter
    return {
        "experts": stacks,
        "other weights, bf16": others,
        "adapter, fp32": adapter,
        "its gradients": adapter,
        "AdamW's states": 2 * adapter,
        "activations, working memory": live.peak - 3 * adapter,
        "peak": stacks + others + adapter + live.peak,
    }
