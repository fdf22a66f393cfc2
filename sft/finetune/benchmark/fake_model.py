"""gpt-oss in its true shapes without any values: its steps can be counted without a GPU.

The model, grouped LoRA and TRL's loss run under torch's FakeTensorMode, in which tensors have
shapes but no storage. What runs as one kernel on a GPU is handed as such to what counts:
memory_count.LiveBytes or op_count.OpCount.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol
from unittest.mock import patch

import torch
from peft import get_peft_model
from transformers import GptOssConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import ModelConfig
from trl.trainer.utils import add_fused_lm_head

from finetune.model.experts import EXPERTS_IMPLEMENTATION, register_experts, use_grouped_lora
from finetune.model.loading import meta_model
from finetune.model.lora import lora_config
from finetune.model.lora_linear import use_low_rank_linears
from finetune.model.mxfp4 import BLOCK_SIZE, Mxfp4Weight
from finetune.model.norms import use_fused_norms
from finetune.model.rotary import rotate, use_fused_rotary
from finetune.model.weights import restore_buffers

ATTENTION = "counted"  # the name of counted_attention in a model's config
# The parts of a step that kernels of our own and of libraries are counted under.
EXPERTS_PART, UNPACKING_PART = "experts' element-wise kernels", "unpacking MXFP4"
GROUPED_PART = "grouped GEMMs of the base"
ATTENTION_PART, NORM_PART, HEAD_PART = "attention", "RMSNorm", "dense GEMMs and head"
ROTARY_PART = "rotary embedding"


class Counter(Protocol):
    """What counts a step; it is a TorchDispatchMode as well."""

    def as_kernel(
        self, function: Callable[..., Any], *, part: str, flops: Callable[..., float] | None = None
    ) -> Callable[..., Any]:
        """The function, counted as one kernel that reads its tensors and writes its results.

        flops: how many operations it does, by its arguments. A result that shares the storage of
        an argument is written in place.
        """

    def first_rows(self, num_chunks: int, num_rows: int) -> list[int]:
        """Where the rows of each chunk of experts begin, and the number of rows at the end."""


def flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor, keys: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp of the scores. keys: those that a query attends to."""
    return torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32)


def flash_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    keys: float,
) -> tuple[torch.Tensor, ...]:
    """The gradients of q, k, v and the sinks."""
    return tuple(torch.empty_like(tensor) for tensor in (q, k, v, sinks))


def flash_forward_flops(q: torch.Tensor, *others: Any) -> float:
    """Two products, scores and output, of 2 head_dim FLOPs a query and key."""
    return 4 * q.numel() * others[-1]


def flash_backward_flops(grad: torch.Tensor, *others: Any) -> float:
    """Five products: the scores again, and the gradients of v, of the scores, of q and of k."""
    return 10 * grad.numel() * others[-1]


def packed_product(
    x: torch.Tensor,
    blocks: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    *,
    transpose: bool,
) -> torch.Tensor:
    """x (S, in or out) with experts that are unpacked within the product: (S, out or in)."""
    _, out, groups = scales.shape
    return x.new_empty(len(x), out if transpose else groups * BLOCK_SIZE)


def packed_product_flops(x: torch.Tensor, blocks: torch.Tensor, *others: Any) -> float:
    """2 FLOPs for each weight that a row meets: a byte of one expert's blocks holds two."""
    return 2 * len(x) * 2 * blocks[0].numel()


class FlashAttention(torch.autograd.Function):
    """The tensors that flash attention keeps for its backward, without their values."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor,
        keys: float,
    ) -> torch.Tensor:
        out, lse = flash_forward(q, k, v, sinks, keys)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.keys = keys
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        return *flash_backward(grad, q, k, v, sinks, out, lse, ctx.keys), None


def norm_forward(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed rows, and of each row what it was multiplied by."""
    return torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)


def norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and of the weight."""
    return torch.empty_like(x), torch.empty_like(weight)


class RMSNorm(torch.autograd.Function):
    """The tensors that torch's kernel keeps for its backward, without their values."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed, rstd = norm_forward(x, weight)
        ctx.save_for_backward(x, weight, rstd)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return norm_backward(grad, *ctx.saved_tensors)


def counted_norm(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm with the signature of torch.nn.functional.rms_norm."""
    return RMSNorm.apply(x, weight)


def counted_attention(
    module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any
) -> tuple[Any, None]:
    """FlashAttention with the signature that transformers calls: q (B, H, T, D) to (B, T, H, D).

    A token attends to half of its conversation on average, and in a sliding layer to at most the
    window, as in model/flops.py.
    """
    keys = min(module.config.counted_context / 2, module.sliding_window or float("inf"))
    return FlashAttention.apply(q, k, v, module.sinks, keys).transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Let a GptOssConfig name counted_attention as its attention, for which no mask is made."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, counted_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *args, **kwargs: None)


@contextmanager
def as_on_a_gpu(counter: Counter, *, unpacks_in_product: bool = False) -> Iterator[None]:
    """Let the code that runs as kernels on a GPU count as those kernels.

    unpacks_in_product: what unpacking_probe.py has chosen.

    The functions are replaced by unittest.mock.patch for the time of a count, because what is
    counted must be the code of training itself, which has no hooks for counting. patch raises
    AttributeError if one of them has been renamed.
    """

    def unpack(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return torch.empty(*scales.shape[:-1], scales.shape[-1] * BLOCK_SIZE, dtype=torch.bfloat16)

    def bounds(offsets: torch.Tensor, *, step: int, num_rows: int) -> list[int]:
        return counter.first_rows(-(-len(offsets) // step), num_rows)

    def forward_tile(tile: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """A tile of TRL's loss is computed in registers, into tensors that are there already."""

    def backward_tile(tile: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The logits of a tile become their gradients in place."""
        return tile

    def addmm_fp32(sums: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """On a GPU cuBLAS adds bf16 products to fp32 sums, without casts of its inputs."""
        sums.addmm_(a, b)

    as_kernel = counter.as_kernel
    replacements = {
        # On a GPU the head is given only the tokens in the loss.
        "trl.trainer.utils._use_triton": lambda device: True,
        "finetune.model.expert_ops.fused": lambda function, like: as_kernel(
            function, part=EXPERTS_PART
        ),
        "finetune.model.mxfp4.unpack": as_kernel(unpack, part=UNPACKING_PART),
        "finetune.model.mxfp4.bounds": bounds,
        "finetune.model.mxfp4.unpacks_in_product": unpacks_in_product,
        "finetune.model.mxfp4.fused_unpacking.packed_grouped_mm": as_kernel(
            packed_product, part=GROUPED_PART, flops=packed_product_flops
        ),
        "trl.kernels.chunked_logprob._forward_tile": as_kernel(forward_tile, part=HEAD_PART),
        "trl.kernels.chunked_logprob._backward_tile": as_kernel(backward_tile, part=HEAD_PART),
        "trl.kernels.chunked_logprob._addmm_fp32": addmm_fp32,
        "finetune.model.norms.rms_norm": counted_norm,
        "finetune.model.rotary.on_device": lambda like: as_kernel(rotate, part=ROTARY_PART),
        f"{__name__}.norm_forward": as_kernel(norm_forward, part=NORM_PART),
        f"{__name__}.norm_backward": as_kernel(norm_backward, part=NORM_PART),
        f"{__name__}.flash_forward": as_kernel(
            flash_forward, part=ATTENTION_PART, flops=flash_forward_flops
        ),
        f"{__name__}.flash_backward": as_kernel(
            flash_backward, part=ATTENTION_PART, flops=flash_backward_flops
        ),
    }
    with ExitStack() as stack:
        for name, replacement in replacements.items():
            stack.enter_context(patch(name, replacement))
        yield


def make_model(
    config: GptOssConfig, lora: ModelConfig, *, context: float, activation_checkpointing: bool
) -> Any:
    """gpt-oss with LoRA as train.py makes it, on the meta device.

    context: the mean length of a conversation in tokens.
    """
    register_experts()
    register_attention()
    config = copy.deepcopy(config)
    config._attn_implementation, config._experts_implementation = ATTENTION, EXPERTS_IMPLEMENTATION
    config.counted_context = context
    model: Any = meta_model(config)
    use_fused_norms(model)
    use_fused_rotary()
    base = model
    with torch.device("meta"):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        adapter = lora_config(model, lora)
        if adapter is not None:
            model = get_peft_model(model, adapter)
    use_grouped_lora(model)
    use_low_rank_linears(model)
    if activation_checkpointing:
        base.activation_checkpointing_enable({"preserve_rng_state": False, "use_reentrant": False})
        base.enable_input_require_grads()
    return model.train()


def to_fake(model: Any, *, packed: bool) -> None:
    """Move a model from the meta device to FakeTensorMode, in which this has to be called.

    packed: the experts are in MXFP4.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, without_bytes(parameter, packed=packed))
    restore_buffers(model, torch.device("cpu"))


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


def selects_by_mask(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation takes the rows of a mask, whose number only values could tell."""
    if func.overloadpacket is not torch.ops.aten.index:
        return False
    indices = args[1]
    return len(indices) == 1 and indices[0].dtype == torch.bool


def every_row(x: torch.Tensor, indices: list[torch.Tensor]) -> torch.Tensor:
    """What a mask that is true everywhere selects: every token counted here is in the loss."""
    return x.flatten(0, indices[0].ndim - 1).clone()


def forward_and_backward(model: Any, ids: torch.Tensor) -> None:
    """One microbatch, as the trainer runs it. ids: (B, T), tokens, all of them in the loss."""
    with torch.autocast("cpu", torch.bfloat16):
        inputs = {"input_ids": ids, "labels": ids, "position_ids": ids}
        loss = model(**inputs, fused_lm_head=True).loss
    loss.backward()


def few_layers(config: GptOssConfig, *, fewest: int = 2) -> list[GptOssConfig]:
    """The config with `fewest` layers and with two more, or as it is if it has no more than those.

    Layers are added in pairs, one of each kind of attention, so that each pair costs the same.
    """
    if config.num_hidden_layers <= fewest + 2:
        return [config]
    configs = [copy.deepcopy(config) for _ in range(2)]
    for few, num_layers in zip(configs, (fewest, fewest + 2), strict=True):
        few.num_hidden_layers, few.layer_types = num_layers, config.layer_types[:num_layers]
    return configs


def at_all_layers(
    counted: list[dict[str, Any]], config: GptOssConfig, *, fewest: int = 2
) -> dict[str, Any]:
    """What is counted at all layers, by name, from what was counted at those of few_layers(config).

    A fixed part and one for each pair of layers; for even numbers of layers it is exact.
    """
    if len(counted) == 1:
        return counted[0]
    few, more = counted
    pairs = (config.num_hidden_layers - fewest) / 2
    return {name: few[name] + (more[name] - few[name]) * pairs for name in few}
