"""Bytes that a training step of all weights holds on one of the GPUs that share them, counted.

FSDP2 itself runs on a model without values (fake_model.py), among ranks that torch's "fake" backend
only pretends: every collective allocates what it would, and nothing travels. What FSDP2 does on
another stream meanwhile, gathering the next layer in the forward, is not in the count; in the
backward, where the peak is, it gathers ahead in the same order as on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import GptOssConfig
from trl import ModelConfig

from finetune.benchmark.fake_model import (
    as_on_a_gpu,
    at_all_layers,
    few_layers,
    forward_and_backward,
    make_model,
)
from finetune.benchmark.memory_count import LiveBytes
from finetune.benchmark.synthetic import MEAN_LENGTH
from finetune.model.weights import restore_buffers

# With fewer layers than these there is no layer left to gather ahead while one is in its backward.
FEWEST = 4
# As configure_gradients of training/trainer.py sets it.
PRECISION = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def count_sharded(
    config: GptOssConfig,
    *,
    num_gpus: int,
    max_length: int,
    batch_size: int,
    activation_checkpointing: bool = True,
) -> dict[str, int]:
    """Bytes of a GPU at the peak of a step, by what they hold.

    The gradients are there, as from the second microbatch on. Counted at few layers and scaled to
    all, as memory_count.count does it.
    """
    with pretended_ranks(num_gpus) as mesh:
        counted = [
            count_layers(
                few,
                mesh,
                ids=(batch_size, max_length),
                activation_checkpointing=activation_checkpointing,
            )
            for few in few_layers(config, fewest=FEWEST)
        ]
    held = at_all_layers(counted, config, fewest=FEWEST)
    return {name: round(size) for name, size in held.items()}


@contextmanager
def pretended_ranks(num_gpus: int) -> Iterator[DeviceMesh]:
    """This process as the first of so many, of which there are no others."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_gpus)
    try:
        yield init_device_mesh("cpu", (num_gpus,))
    finally:
        dist.destroy_process_group()


def count_layers(
    config: GptOssConfig, mesh: DeviceMesh, *, ids: tuple[int, int], activation_checkpointing: bool
) -> dict[str, int]:
    """As count_sharded, of a model as it is. ids: the shape of a batch of tokens, (B, T)."""
    model = sharded_model(config, mesh, activation_checkpointing=activation_checkpointing)
    # The sharded parameters are on the meta device until they are made empty.
    with FakeTensorMode(allow_non_fake_inputs=True):
        peak = peak_of_step(model, ids)
    shard = bytes_of_shard(model)
    return {
        "weights, fp32": shard,
        "their gradients": shard,
        "AdamW's states": 2 * shard,
        "gathered weights, activations, working memory": peak - shard,
        "peak": 3 * shard + peak,
    }


def sharded_model(config: GptOssConfig, mesh: DeviceMesh, *, activation_checkpointing: bool) -> Any:
    """gpt-oss in fp32 on the meta device, shared out as accelerate does it with fsdp2.yaml."""
    model = make_model(
        config,
        ModelConfig(),
        context=MEAN_LENGTH,
        activation_checkpointing=activation_checkpointing,
    ).float()
    for module in (*model.model.layers, model):  # a group for each layer, and one for all the rest
        fully_shard(module, mesh=mesh, mp_policy=PRECISION, reshard_after_forward=True)
    return model


def peak_of_step(model: Any, ids: tuple[int, int]) -> int:
    """Bytes at the peak of a microbatch beyond the weights. The gradients are there before it."""
    model.to_empty(device="cpu")
    restore_buffers(model, torch.device("cpu"))
    tokens = torch.zeros(ids, dtype=torch.long)
    live = LiveBytes(model)
    with live, as_on_a_gpu(live):
        for _ in range(2):  # in the second the gradients are there as well
            forward_and_backward(model, tokens)
    return live.peak


def bytes_of_shard(model: Any) -> int:
    """Of the weights of this rank."""
    return sum(parameter.to_local().nbytes for parameter in model.parameters())
