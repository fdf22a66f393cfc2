"""Bytes that a training step moves, on paper: between GPUs, and from memory to unpack MXFP4."""

from dataclasses import dataclass

import torch
from peft import get_peft_model
from transformers import GptOssConfig
from trl import ModelConfig

from finetune.model.loading import meta_model
from finetune.model.lora import lora_config


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: of all decoder layers, the embedding, the head, and the adapter."""

    layers: int
    embedding: int
    head: int  # with the norm before it
    adapter: int  # 0 if all weights are trained

    @property
    def model(self) -> int:
        return self.layers + self.embedding + self.head


def count_parameters(config: GptOssConfig, lora: ModelConfig) -> Parameters:
    """Those of the model that train.py would make, and of the adapter that PEFT would add to it.

    lora: the flags of --use_peft, --lora_r, --lora_target_modules and so on. Nothing of the model
    but its shapes is made.
    """
    model = meta_model(config)
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    embedding = model.model.embed_tokens.weight.numel()
    head = model.num_parameters() - layers - embedding
    adapter = 0
    adapter_config = lora_config(model, lora)
    if adapter_config is not None:
        with torch.device("meta"):
            adapted = get_peft_model(model, adapter_config)
        adapter = adapted.num_parameters(only_trainable=True)
    return Parameters(layers, embedding, head, adapter)


def bytes_between_gpus(parameters: Parameters, *, sharded: bool, lora: bool) -> int:
    """Bytes of all collectives of a step, before the factor (W - 1) / W of W GPUs.

    Weights are gathered in bf16, gradients reduced in fp32. An all-reduce counts twice, since it is
    a reduce-scatter and an all-gather.
    """
    trainable = parameters.adapter if lora else parameters.model
    if not sharded:
        return 2 * 4 * trainable
    # Layers and embedding before the forward and again before the backward; the head only once.
    gathered = 2 * (parameters.layers + parameters.embedding) + parameters.head
    gathered += 2 * parameters.adapter
    return 2 * gathered + 4 * trainable


def bytes_unpacked(config: GptOssConfig) -> int:
    """Bytes read and written in a step to unpack all experts from MXFP4.

    gate_up is unpacked three times: in the forward, its recomputation and the backward. down is
    half as large and unpacked twice: the recomputation ends before it. Each weight is read as 17/32
    of a byte (half a byte, and its share of a scale) and written as two bytes.
    """
    down = config.num_local_experts * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (3 * 2 * down + 2 * down) * (17 + 64) // 32
