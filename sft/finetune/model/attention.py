"""Attention for gpt-oss, whose heads have learned sinks: choose the fastest implementation that is
correct on this machine, and keep the conversations of a packed row apart.
"""

import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

from finetune.model.probing import failure_of, relative_difference

FASTEST_FIRST = ("flash_attention_4", "flex_attention")
# Relative error against eager in fp32. bf16 itself rounds by 0.4%, and flex_attention passes its
# log-sum-exp on in bf16. Leaving out the sinks, the windows or the boundaries between conversations
# changes the result by far more than this.
TOLERANCE = 0.05


def choose_attention() -> str:
    """The implementation that all ranks use; every rank has to call this.

    Ranks may differ, for example in what is installed. They train the same model, so they take the
    slowest of what each would choose.
    """
    return slowest(gather_object([fastest_here()]))


def slowest(implementations: list[str]) -> str:
    """The slowest of these implementations; eager is slower than any in FASTEST_FIRST."""
    return max(implementations, key=(*FASTEST_FIRST, "eager").index)


def cache_flash_attention() -> None:
    """Let flash-attn-4 keep its compiled kernels beside the environment, for the next launch.

    Without that, each process compiles them at each launch. Its own cache is off by default, and
    both variables are read when it is imported (flash_attn/cute/cache_utils.py of 4.0.0b36).
    Processes share the cache behind a lock; what the user has set stays.
    """
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    folder = Path(sys.prefix) / "flash-attention-cache"
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))


def fastest_here() -> str:
    """The fastest implementation that trains gpt-oss on this machine as eager attention does.

    Each one is tried on a packed row. flash-attn-4 needs Hopper or Blackwell, flex_attention any
    CUDA GPU; eager takes O(T^2) memory and is the fallback. Prints why a faster one is not used.
    """
    if not torch.cuda.is_available():
        return "eager"
    cache_flash_attention()
    for implementation in FASTEST_FIRST:
        refusal = probe(implementation, device="cuda")
        if refusal is None:
            return implementation
        PartialState().print(f"attention: {implementation} is not used: {refusal}", flush=True)
    return "eager"


def probe(implementation: str, *, device: str) -> str | None:
    """Why an implementation cannot be used; None if its results in bf16 equal eager's in fp32.

    Running it is the only reliable test: an implementation that is unaware of the sinks computes
    something else and raises nothing.
    """
    try:
        actual = outputs_and_gradients(implementation, device=device, dtype=torch.bfloat16)
    except Exception as error:  # a missing package, or whatever a kernel's compiler raises
        return failure_of(error)
    expected = outputs_and_gradients("eager", device=device, dtype=torch.float32)
    for name, value in expected.items():
        difference = relative_difference(actual[name], value)
        if not difference <= TOLERANCE:
            return f"{name} differs from eager's by {difference:.1%}"
    return None


def outputs_and_gradients(
    implementation: str,
    *,
    device: str,
    dtype: torch.dtype,
    lengths: tuple[int, ...] = (1, 300, 77, 130),
) -> dict[str, torch.Tensor]:
    """Run one sliding and one full attention layer, of gpt-oss's head size, on a packed row.

    lengths: tokens of each conversation in the row. The default has conversations that are shorter
    and longer than the window of 128, and lengths that are no multiple of a kernel's tile.
    Returns each layer's output (1, T, D) and the gradients of the input, of q, k, v and o, and of
    the sinks. The random numbers are the same on every call.
    """
    config = GptOssConfig(
        num_hidden_layers=2, hidden_size=128, num_attention_heads=16, num_key_value_heads=2
    )
    config._attn_implementation = implementation
    generator = torch.Generator().manual_seed(0)
    layers = [GptOssAttention(config, layer_idx=index) for index in range(2)]
    for parameter in chain.from_iterable(layer.parameters() for layer in layers):
        # Drawn on the CPU, so that every device gets the same numbers. Sinks and biases, of one
        # dimension, are not scaled down, so that a sink takes a visible share of the attention.
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = (values * (1 if parameter.ndim == 1 else 0.1)).to(device, dtype)
    x = torch.randn(1, sum(lengths), config.hidden_size, generator=generator)
    x = x.to(device, dtype).requires_grad_()
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    rotary = GptOssRotaryEmbedding(config).to(device)(x, position_ids)
    # Flash attention takes no mask: it finds the conversations by position_ids.
    masks = {} if "flash" in implementation else packed_masks(config, position_ids, dtype=dtype)

    named: dict[str, Any] = {}
    for kind, layer in zip(config.layer_types, layers, strict=True):
        y, _ = layer(x, rotary, masks.get(kind), position_ids=position_ids)
        # A random weighted sum as the loss, so that every output has a gradient of its own.
        weights = torch.randn(y.shape, generator=generator).to(device, dtype)
        (y * weights).sum().backward()
        named[f"{kind}'s output"] = y.detach()
        for name, parameter in layer.named_parameters():
            named[f"{kind}'s gradient of {name}"] = parameter.grad
    return named | {"the gradient of the input": x.grad}


def packed_masks(
    config: GptOssConfig, position_ids: torch.Tensor, *, dtype: torch.dtype, past: Any = None
) -> dict[str, Any]:
    """The attention mask of each kind of layer, in the form that the implementation takes.

    position_ids (B, T) start again at 0 with each conversation of a row. past: a cache of keys and
    values when generating.
    """
    kwargs = {
        "config": config,
        # transformers reads only its shape, dtype and device, so it needs no values.
        "inputs_embeds": position_ids.new_empty((*position_ids.shape, 0), dtype=dtype),
        "attention_mask": None,
        "past_key_values": past,
        "position_ids": position_ids,
    }
    return {
        "full_attention": create_causal_mask(**kwargs),
        "sliding_attention": create_sliding_window_causal_mask(**kwargs),
    }


def isolate_packed_sequences(model: GptOssForCausalLM) -> None:
    """Keep the conversations of a packed row from attending to each other.

    GptOssModel.forward builds its masks without position_ids, so that eager and flex_attention see
    a packed row as one long conversation (huggingface/transformers#39997, still so in 5.23.0;
    delete this function once transformers passes position_ids on). Flash attention needs no mask:
    it reads the boundaries from position_ids itself.
    """
    if "flash" in model.config._attn_implementation:
        return

    def build_masks(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # GptOssModel uses a dict of masks as it is and builds none. A mask that the caller gives
        # stays: batches that are padded and not packed have one.
        position_ids = kwargs.get("position_ids")
        if position_ids is not None and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = packed_masks(
                module.config,
                position_ids,
                dtype=torch.bfloat16,
                past=kwargs.get("past_key_values"),
            )
        return args, kwargs

    model.model.register_forward_pre_hook(build_masks, with_kwargs=True)
