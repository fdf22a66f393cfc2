"""Operations are counted as they run: FLOPs, bytes, launches, host waits, and the least time."""

from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from trl import ModelConfig

from finetune.benchmark.fake_model import ATTENTION_PART, HEAD_PART, make_model
from finetune.benchmark.gpus import GPUS, gpu_named
from finetune.benchmark.op_count import (
    ELEMENTWISE_PART,
    GROUPED_PART,
    LORA_PART,
    Cost,
    OpCount,
    count_microbatch,
    count_model,
)
from finetune.benchmark.synthetic import make_config

H100 = gpu_named("H100-SXM")
LORA = ModelConfig(use_peft=True, lora_r=8, lora_alpha=16, lora_dropout=0.0)
TOKENS, CONTEXT = 256, 100.0


def count_tiny(lora: ModelConfig, num_layers: int, **changes: Any) -> dict[str, Cost]:
    shape: dict[str, Any] = {"max_length": TOKENS, "batch_size": 1, "context": CONTEXT}
    config = make_config("20b", tiny=True, num_layers=num_layers)
    return count_microbatch(config, lora, H100, packed=lora.use_peft, **(shape | changes))


def test_a_product_counts_its_flops_and_its_bytes_once_and_views_cost_nothing() -> None:
    with FakeTensorMode(), OpCount(H100, rank=8) as counted:
        x = torch.empty(64, 32, dtype=torch.bfloat16)
        w = torch.empty(128, 32, dtype=torch.bfloat16)
        y = x @ w.t().contiguous().t().t()
        y.view(-1)[5:].unflatten(0, (-1, 1))
        x @ w[:8].t()
    dense = counted.parts[HEAD_PART]
    size = 2 * (64 * 32 + 32 * 128 + 64 * 128)
    assert astuple(dense)[:4] == (2 * 64 * 32 * 128, size, 1, 0)
    assert dense.seconds == size / 3.35e12  # so few FLOPs take less time than their bytes
    assert counted.parts[LORA_PART].flops == 2 * 64 * 32 * 8
    transposed = counted.parts[ELEMENTWISE_PART]
    assert (transposed.bytes, transposed.launches) == (2 * 2 * 128 * 32, 1)


@pytest.mark.parametrize(
    "run, elements",
    [
        (lambda x: x.add_(1), 200),  # read and written
        (lambda x: x.zero_(), 100),
        (lambda x: x.copy_(x.new_empty(10, 10)), 200),
        (lambda x: x.sum(), 101),
        (lambda x: x[:1].expand(10, 10) + 0, 110),  # the ten that there are, and the result
        (lambda x: x[torch.empty(3, dtype=torch.long)], 60),  # of a table, the rows it asks for
        (lambda x: x.transpose(0, 1), 0),
    ],
)
def test_bytes_are_those_that_are_read_and_written(run: Any, elements: int) -> None:
    with FakeTensorMode():
        x = torch.empty(10, 10)
        with OpCount(H100, rank=None) as counted:
            run(x)
    assert counted.parts[ELEMENTWISE_PART].bytes == 4 * elements


def test_the_host_waits_for_a_number_and_for_the_rows_of_a_mask() -> None:
    with OpCount(H100, rank=None) as counted:
        x = torch.ones(2, 3, 4)
        assert bool(x.sum() > 0)
        x[torch.ones(2, 3, dtype=torch.bool)]
    assert sum(cost.waits for cost in counted.parts.values()) == 2


def test_products_are_as_many_as_the_shapes_say() -> None:
    """Forward and two gradients, of a frozen weight one; gate_up is computed again, down is not."""
    config = make_config("20b", tiny=True)
    down = TOKENS * config.num_experts_per_tok * 2 * 64 * 64 * config.num_hidden_layers
    gate_up = 2 * down
    queries = TOKENS * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    full, lora = count_tiny(ModelConfig(), 2), count_tiny(LORA, 2)
    assert full[GROUPED_PART].flops == 4 * gate_up + 3 * down
    assert lora[GROUPED_PART].flops == 3 * gate_up + 2 * down
    assert full[LORA_PART] == Cost() and lora[LORA_PART].flops > 0
    # Two forwards of 4 and a backward of 10, for half of a conversation's tokens: 50.
    assert full[ATTENTION_PART].flops == (4 + 4 + 10) * queries * CONTEXT / 2
    kept = count_tiny(LORA, 2, activation_checkpointing=False)
    assert kept[GROUPED_PART].flops == 2 * gate_up + 2 * down


def test_few_layers_scale_to_all() -> None:
    """Six layers are counted at two and at four; counted as they are, they cost the same."""
    config = make_config("20b", tiny=True, num_layers=6)
    model = make_model(config, LORA, context=CONTEXT, activation_checkpointing=True)
    whole = count_model(model, H100, ids=(1, TOKENS), rank=8, packed=True)
    scaled = count_tiny(LORA, 6)
    for part, cost in whole.items():
        assert astuple(scaled[part]) == pytest.approx(astuple(cost)), part


def test_each_operation_takes_the_longer_of_both_times() -> None:
    slow = replace(H100, bandwidth=1e3)
    with FakeTensorMode(), OpCount(slow, rank=None) as counted:
        torch.empty(8, 8) @ torch.empty(8, 8)
    assert counted.parts[HEAD_PART].seconds == 3 * 64 * 4 / 1e3
    assert [gpu.name for gpu in GPUS if gpu.flops > H100.flops] == ["B200"]
    assert H100.flops == pytest.approx(800e12)
