"""Floating-point operations: how many a token costs, and how many a GPU does in a second."""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula
from transformers import GptOssConfig

# Dense bf16 peak, FLOP/s, from NVIDIA's data sheets (H100 and H200 are the SXM parts).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


@register_flop_formula(torch.ops.aten._grouped_mm)
def grouped_mm_flops(
    a: tuple[int, ...], b: tuple[int, ...], *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """FLOPs of a grouped GEMM; torch 2.13's FlopCounterMode has no formula for it.

    a (S, K) times b (E, K, N), where each of the S rows is multiplied by one expert's weight. Or,
    for the gradient of a stack of weights, a (K, S) times b (S, N), summed by expert.
    """
    return 2 * a[0] * a[1] * b[-1]


def flops_per_token(config: GptOssConfig, *, context: float, lora: bool) -> float:
    """FLOPs of one token, forward and backward, as MFU counts them (PaLM paper, appendix B).

    Recomputed activations do not count. Each weight that a token meets costs 2 FLOPs in forward
    and 2 for the gradient of its input; a full run adds 2 for the weight's own gradient. Of the
    experts, only those that the token is routed to count. Attention costs 4 * heads * head_dim *
    keys per layer in forward and twice that in backward. `context` is the mean length of a
    conversation in tokens: on average a token attends to half of it, and in a sliding layer to at
    most the window.
    """
    q_dim = config.num_attention_heads * config.head_dim
    kv_dim = config.num_key_value_heads * config.head_dim
    attention_weights = config.hidden_size * (2 * q_dim + 2 * kv_dim)
    expert_weights = 3 * config.hidden_size * config.intermediate_size
    router_weights = config.hidden_size * config.num_local_experts
    layer = attention_weights + config.num_experts_per_tok * expert_weights + router_weights
    active = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    keys = sum(
        min(context / 2, config.sliding_window) if kind == "sliding_attention" else context / 2
        for kind in config.layer_types
    )
    return (4 if lora else 6) * active + 12 * q_dim * keys


def peak_flops() -> float | None:
    """This GPU's dense bf16 peak in FLOP/s. None if the table lacks it: an MFU is never guessed."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
