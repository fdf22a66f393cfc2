"""OpenAI's own torch model of gpt-oss (gpt_oss/torch/model.py on PyPI), under our weights' names.

It is somebody else's code for all that makes gpt-oss special: YaRN's frequencies, sinks, the
sliding window, the router, the clamped SwiGLU and the order of MXFP4's nibbles.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig

sys.path.append(str(Path(sys.prefix) / "openai"))  # where the Makefile installs it

from gpt_oss.torch.model import ModelConfig, Transformer
from gpt_oss.torch.weights import Checkpoint

LAYER = "model.layers.{}."
# The reference's name of each weight of a layer, and the weights that it is made of here.
LAYER_NAMES = {
    "attn.norm.scale": ["input_layernorm.weight"],
    "attn.qkv.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "attn.qkv.bias": [f"self_attn.{part}_proj.bias" for part in "qkv"],
    "attn.sinks": ["self_attn.sinks"],
    "attn.out.weight": ["self_attn.o_proj.weight"],
    "attn.out.bias": ["self_attn.o_proj.bias"],
    "mlp.norm.scale": ["post_attention_layernorm.weight"],
    "mlp.gate.weight": ["mlp.router.weight"],
    "mlp.gate.bias": ["mlp.router.bias"],
    "mlp.mlp1_weight": ["mlp.experts.gate_up_proj"],
    "mlp.mlp1_bias": ["mlp.experts.gate_up_proj_bias"],
    "mlp.mlp2_weight": ["mlp.experts.down_proj"],
    "mlp.mlp2_bias": ["mlp.experts.down_proj_bias"],
}
OUTER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "unembedding.weight": "lm_head.weight",
}


def reference_model(config: GptOssConfig, weights: dict[str, torch.Tensor]) -> Any:
    """The reference in fp32. weights: by the names of GptOssForCausalLM, experts (E, in, out)."""
    rope = config.rope_parameters
    model = Transformer(
        ModelConfig(
            num_hidden_layers=config.num_hidden_layers,
            num_experts=config.num_local_experts,
            experts_per_token=config.num_experts_per_tok,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            head_dim=config.head_dim,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            sliding_window=config.sliding_window,
            initial_context_length=rope["original_max_position_embeddings"],
            rope_theta=rope["rope_theta"],
            rope_scaling_factor=rope["factor"],
            rope_ntk_alpha=rope["beta_slow"],
            rope_ntk_beta=rope["beta_fast"],
        ),
        device=torch.device("cpu"),
    ).float()
    model.load_state_dict(as_reference(weights, config.num_hidden_layers))
    return model


def as_reference(weights: dict[str, torch.Tensor], num_layers: int) -> dict[str, torch.Tensor]:
    """Weights, or their gradients, under the reference's names and in its layout."""
    renamed = {name: weights[ours] for name, ours in OUTER_NAMES.items()}
    for layer in range(num_layers):
        for name, ours in LAYER_NAMES.items():
            parts = [weights[LAYER.format(layer) + part] for part in ours]
            joined = torch.cat(parts)
            # Experts are (E, out, in) there.
            is_stack = joined.ndim == 3
            renamed[f"block.{layer}.{name}"] = joined.transpose(1, 2) if is_stack else joined
    return renamed


def read_mxfp4(folder: Path, name: str) -> torch.Tensor:
    """A stack of experts as the reference reads it from a folder of safetensors: (E, out, in)."""
    checkpoint = Checkpoint(str(folder), torch.device("cpu"))
    return checkpoint._get_mxfp4_tensor(f"{name}_blocks", f"{name}_scales")
