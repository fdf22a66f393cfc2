"""Bytes that a training step moves, on paper: between GPUs, and from memory to unpack MXFP4."""

from dataclasses import dataclass

from transformers import GptOssConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: of all decoder layers, the embedding, the head, and the adapter."""

    layers: int
    embedding: int
    head: int
    adapter: int

    @property
    def model(self) -> int:
        return self.layers + self.embedding + self.head


def count_parameters(config: GptOssConfig, *, lora_r: int) -> Parameters:
    """Those of a model, and of LoRA on every linear layer of its decoder and every expert."""
    hidden, width = config.hidden_size, config.intermediate_size
    num_layers, num_experts = config.num_hidden_layers, config.num_local_experts
    q_dim = config.num_attention_heads * config.head_dim
    kv_dim = config.num_key_value_heads * config.head_dim
    attention = hidden * (2 * q_dim + 2 * kv_dim) + q_dim + 2 * kv_dim + hidden
    experts = num_experts * (3 * hidden * width + 2 * width + hidden)
    router, norms_and_sinks = num_experts * (hidden + 1), 2 * hidden + config.num_attention_heads
    layer = attention + experts + router + norms_and_sinks
    # LoRA's A and B of a weight (in, out) have r * (in + out) parameters.
    inputs_and_outputs = 2 * (hidden + q_dim) + 2 * (hidden + kv_dim)
    inputs_and_outputs += num_experts * (hidden + 2 * width + width + hidden)
    return Parameters(
        layers=num_layers * layer,
        embedding=config.vocab_size * hidden,
        head=config.vocab_size * hidden + hidden,  # with the norm before it
        adapter=num_layers * lora_r * inputs_and_outputs,
    )


def bytes_between_gpus(parameters: Parameters, *, sharded: bool, lora: bool) -> int:
    """Bytes of all collectives of a step, before the factor (W - 1) / W of W GPUs.

    Weights are gathered in bf16, gradients reduced in fp32. An all-reduce counts twice, since it is
    a reduce-scatter and an all-gather.
    """
    adapter = parameters.adapter if lora else 0
    trainable = adapter if lora else parameters.model
    if not sharded:
        return 2 * 4 * trainable
    # Layers and embedding before the forward and again before the backward; the head only once.
    gathered = 2 * (parameters.layers + parameters.embedding + adapter) + parameters.head
    return 2 * gathered + 4 * trainable


def bytes_unpacked(config: GptOssConfig) -> int:
    """Bytes read and written in a step to unpack all experts from MXFP4.

    They are unpacked three times: in the forward, its recomputation and the backward. Each weight
    is read as 17/32 of a byte (half a byte, and its share of a scale) and written as two bytes.
    """
    weights = 3 * config.num_local_experts * config.hidden_size * config.intermediate_size
    return 3 * config.num_hidden_layers * weights * (17 + 64) // 32
