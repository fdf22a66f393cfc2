"""Bytes that a training step moves beside its operations, on paper: between GPUs and in memory."""

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
    """Bytes of all collectives, before the factor (W - 1) / W of W GPUs.

    sharded: those of a microbatch under FSDP2; else those of an optimizer step under DDP.
    Weights are gathered in bf16, gradients reduced in fp32. An all-reduce counts twice, since it is
    a reduce-scatter and an all-gather.
    """
    trainable = parameters.adapter if lora else parameters.model
    if not sharded:
        return 2 * 4 * trainable
    return 2 * weights_gathered(parameters) + 4 * trainable


def weights_gathered(parameters: Parameters) -> int:
    """How many weights FSDP2 gathers in a microbatch.

    Layers, embedding and adapter before the forward and again before the backward; the head once.
    """
    twice = parameters.layers + parameters.embedding + parameters.adapter
    return 2 * twice + parameters.head


def bytes_copied(parameters: Parameters, *, lora: bool) -> int:
    """Bytes that FSDP2 reads and writes in a GPU's own memory in a microbatch, beside computing.

    What has been gathered is copied from one buffer into the layer's weights, in bf16. The bf16
    gradients are copied into one fp32 buffer before they are reduced. See foreach_reduce and
    foreach_all_gather_copy_out of torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, 2.13.
    """
    trainable = parameters.adapter if lora else parameters.model
    return (2 + 2) * weights_gathered(parameters) + (2 + 4) * trainable


def bytes_of_optimizer(parameters: Parameters, *, lora: bool) -> int:
    """Bytes that clipping and AdamW read and write in a step, over all shards, in fp32.

    The norm reads the gradients and clipping scales them: 4 + 8 bytes a parameter. The fused AdamW
    reads weight, gradient and two states, and writes all but the gradient: 16 + 12.
    """
    return 40 * (parameters.adapter if lora else parameters.model)
