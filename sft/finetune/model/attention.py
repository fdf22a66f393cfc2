"""Attention with gpt-oss's sinks: which implementation is right on this machine, and fastest; and
the conversations of a packed row kept apart.
"""

from itertools import chain
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

FASTEST_FIRST = ("flash_attention_4", "flex_attention")
# bf16 rounds by 0.4%, and flex_attention hands on its LSE in bf16; leaving out sinks, windows or
# boundaries is worth far more.
TOLERANCE = 0.05


def choose_attention() -> str:
    """What the rank that can do least uses; all ranks call this, and all do the same."""
    slowest_last = (*FASTEST_FIRST, "eager")
    return max(gather_object([fastest_here()]), key=slowest_last.index)


def fastest_here() -> str:
    """The fastest implementation that trains gpt-oss here as eager does, the sinks included.

    Each is run on a packed row. flash-attn-4 needs Hopper or Blackwell, flex_attention any CUDA
    GPU; eager, O(T^2) in memory, is for the rest. Says why a faster one is passed over.
    """
    if not torch.cuda.is_available():
        return "eager"
    for implementation in FASTEST_FIRST:
        refusal = probe(implementation, device="cuda")
        if refusal is None:
            return implementation
        PartialState().print(f"attention: {implementation} is not used: {refusal}", flush=True)
    return "eager"


def probe(implementation: str, *, device: str) -> str | None:
    """Why an implementation cannot be used, or None if in bf16 it equals eager in fp32."""
    try:
        actual = outputs_and_gradients(implementation, device=device, dtype=torch.bfloat16)
    except Exception as error:  # a missing package, or whatever a kernel's compiler raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    expected = outputs_and_gradients("eager", device=device, dtype=torch.float32)
    for name, value in expected.items():
        difference = float((actual[name].float() - value).norm() / value.norm())
        if not difference <= TOLERANCE:  # nan is no less wrong
            return f"{name} differs from eager's by {difference:.1%}"
    return None


def outputs_and_gradients(
    implementation: str,
    *,
    device: str,
    dtype: torch.dtype,
    lengths: tuple[int, ...] = (1, 300, 77, 130),
) -> dict[str, torch.Tensor]:
    """A sliding and a full layer of gpt-oss's head size over conversations packed into one row:
    their outputs (1, T, D), and the gradients of the input and of q, k, v, and sinks.
    """
    config = GptOssConfig(
        num_hidden_layers=2, hidden_size=128, num_attention_heads=16, num_key_value_heads=2
    )
    config._attn_implementation = implementation
    generator = torch.Generator().manual_seed(0)
    layers = [GptOssAttention(config, layer_idx=index) for index in range(2)]
    for parameter in chain.from_iterable(layer.parameters() for layer in layers):
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = (values * (1 if parameter.ndim == 1 else 0.1)).to(device, dtype)
    x = torch.randn(1, sum(lengths), config.hidden_size, generator=generator)
    x = x.to(device, dtype).requires_grad_()
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    rotary = GptOssRotaryEmbedding(config).to(device)(x, position_ids)
    masks = {} if "flash" in implementation else packed_masks(config, position_ids, dtype=dtype)

    named: dict[str, Any] = {}
    for kind, layer in zip(config.layer_types, layers, strict=True):
        y, _ = layer(x, rotary, masks.get(kind), position_ids=position_ids)
        weights = torch.randn(y.shape, generator=generator).to(device, dtype)
        (y * weights).sum().backward()
        named[f"{kind}'s output"] = y.detach()
        for name, parameter in layer.named_parameters():
            named[f"{kind}'s gradient of {name}"] = parameter.grad
    return named | {"the gradient of the input": x.grad}


def packed_masks(
    config: GptOssConfig, position_ids: torch.Tensor, *, dtype: torch.dtype, past: Any = None
) -> dict[str, Any]:
    """A mask for each kind of layer, from position_ids (B, T) that start again at 0 with each
    conversation.
    """
    kwargs = {
        "config": config,
        # Only its shape, dtype and device are read.
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

    GptOssModel.forward builds its masks without position_ids, so eager and flex_attention see one
    long sequence (huggingface/transformers#39997, still so in 5.23.0; delete this when it passes
    them on). Flash attention reads the boundaries from position_ids itself.
    """
    if "flash" in model.config._attn_implementation:
        return

    def build_masks(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
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
