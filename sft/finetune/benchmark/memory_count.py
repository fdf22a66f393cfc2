"""Bytes that a training step of LoRA holds, counted without a GPU and without the bytes.

The model in its true shapes, grouped LoRA, TRL's loss and AdamW run under torch's FakeTensorMode,
in which tensors have shapes but no storage. LiveBytes counts each tensor from the operation that
makes it until it is freed.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import GptOssConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import ModelConfig
from trl.trainer.utils import add_fused_lm_head

from finetune.model.experts import EXPERTS_IMPLEMENTATION, register_experts, use_grouped_lora
from finetune.model.loading import meta_model
from finetune.model.lora import lora_config
from finetune.model.mxfp4 import BLOCK_SIZE, Mxfp4Weight
from finetune.model.weights import restore_buffers

ATTENTION = "counted"  # the name of counted_attention in a model's config


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
        self.counted: dict[int, Any] = {}
        for tensor in chain.from_iterable(map(stored, model.parameters())):
            storage = tensor.untyped_storage()
            self.counted[storage._cdata] = storage

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            # A packed weight has no storage of its own: its blocks and scales are parameters.
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, Mxfp4Weight):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.counted or self.is_paused:
            return

        def free(_: Any) -> None:
            self.now -= size
            del self.counted[key]

        self.counted[key] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)

    def as_kernel(self, function: Callable[..., Any], like: Any = None) -> Callable[..., Any]:
        """The function as one kernel: its results are counted, its intermediate tensors are not.

        like: not used; expert_ops.fused, in whose place this stands, takes it.
        """

        def run(*args: Any) -> Any:
            self.is_paused = True
            results = function(*args)
            self.is_paused = False
            return tree_map(torch.clone, results)  # a clone is new, and is counted

        return run


def stored(parameter: Any) -> list[torch.Tensor]:
    """The tensors that hold the bytes of a parameter."""
    is_packed = isinstance(parameter, Mxfp4Weight)
    return [parameter.blocks, parameter.scales] if is_packed else [parameter]


class FlashAttention(torch.autograd.Function):
    """The tensors that flash attention keeps for its backward, without their values."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor
    ) -> torch.Tensor:
        out, lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:4])


def counted_attention(
    module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any
) -> tuple[Any, None]:
    """FlashAttention with the signature that transformers calls: q (B, H, T, D) to (B, T, H, D)."""
    return FlashAttention.apply(q, k, v, module.sinks).transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Let a GptOssConfig name counted_attention as its attention, for which no mask is made."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, counted_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *args, **kwargs: None)


@contextmanager
def as_on_a_gpu(live: LiveBytes) -> Iterator[None]:
    """Let the code that runs as kernels on a GPU allocate what those kernels allocate.

    The functions are replaced by unittest.mock.patch for the time of a count, because what is
    counted must be the code of training itself, which has no hooks for counting. patch raises
    AttributeError if one of them has been renamed.
    """

    def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.empty(*scales.shape[:-1], scales.shape[-1] * BLOCK_SIZE, dtype=torch.bfloat16)

    def bounds(offsets: torch.Tensor, *, step: int, num_rows: int) -> list[int]:
        """As if every token went to the first experts, where the largest GEMM is the largest."""
        return [0] + [num_rows] * -(-len(offsets) // step)

    def no_tile(*args: Any, **kwargs: Any) -> None:
        """A tile of TRL's loss is computed in registers, into tensors that are there already."""

    replacements = {
        "finetune.model.expert_ops.fused": live.as_kernel,
        "finetune.model.mxfp4.unpack": unpack,
        "finetune.model.mxfp4.bounds": bounds,
        "trl.kernels.chunked_logprob._forward_tile": no_tile,
        "trl.kernels.chunked_logprob._backward_tile": no_tile,
    }
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(patch(name, replacement))
        yield


def make_model(config: GptOssConfig, lora: ModelConfig, *, activation_checkpointing: bool) -> Any:
    """gpt-oss with LoRA as train.py makes it, on the meta device."""
    register_experts()
    register_attention()
    config._attn_implementation, config._experts_implementation = ATTENTION, EXPERTS_IMPLEMENTATION
    model: Any = meta_model(config)
    with torch.device("meta"):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        model = get_peft_model(model, lora_config(model, lora))
    use_grouped_lora(model)
    if activation_checkpointing:
        model.get_base_model().activation_checkpointing_enable(
            {"preserve_rng_state": False, "use_reentrant": False}
        )
        model.enable_input_require_grads()
    return model.train()


def without_bytes(parameter: torch.nn.Parameter, *, packed: bool) -> torch.nn.Parameter:
    """A parameter of the same shape and dtype, for FakeTensorMode. packed: experts in MXFP4."""
    if not (packed and parameter.ndim == 3):
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        return torch.nn.Parameter(values, requires_grad=parameter.requires_grad)
    num_experts, inner, out = parameter.shape
    shape = (num_experts, out, inner // BLOCK_SIZE)
    blocks = torch.empty(*shape, BLOCK_SIZE // 2, dtype=torch.uint8)
    weight = Mxfp4Weight(blocks, torch.empty(shape, dtype=torch.uint8))
    return torch.nn.Parameter(weight, requires_grad=False)


def count(
    config: GptOssConfig,
    lora: ModelConfig,
    *,
    max_length: int,
    batch_size: int,
    packed: bool,
    activation_checkpointing: bool = True,
) -> dict[str, int]:
    """Bytes at the peak of a step, by what they hold. packed: the experts are in MXFP4."""
    model = make_model(config, lora, activation_checkpointing=activation_checkpointing)
    with FakeTensorMode():
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(name, without_bytes(parameter, packed=packed))
        restore_buffers(model, torch.device("cpu"))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        ids = torch.zeros(batch_size, max_length, dtype=torch.long)
        live = LiveBytes(model)
        with live, as_on_a_gpu(live), torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):  # in the second step gradients and AdamW's states are there as well
                inputs = {"input_ids": ids, "labels": ids, "position_ids": ids}
                model(**inputs, fused_lm_head=True).loss.backward()
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
