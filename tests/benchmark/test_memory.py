"""Memory is counted as it is taken, and what the task files promise is kept."""

import gc

import pytest
import torch
from trl import ModelConfig

from finetune.benchmark.synthetic import make_config
from memory import LiveBytes, count

KIB = 1024
LORA = ModelConfig(use_peft=True, lora_r=8, lora_alpha=16, lora_dropout=0.0)


def test_bytes_count_while_they_live() -> None:
    model = torch.nn.Linear(16, 16, bias=False)  # 1 KiB, which is there before
    with LiveBytes(model) as live:
        x = torch.ones(4, 16)
        y = model(x)
        assert live.now == 2 * 4 * 16 * 4
        z = torch.ones(KIB)
        view = z[10:]
        del z
        assert live.now == 2 * 4 * 16 * 4 + 4 * KIB  # the view keeps it
        del view
        live.as_kernel(lambda a: (a * 2).sum())(y)
        y.sum().backward()
        del y
        gc.collect()
        assert live.now == x.nbytes + model.weight.nbytes  # its gradient
        assert live.peak == 2 * 4 * 16 * 4 + 4 * KIB


@pytest.mark.parametrize(
    "size, published, gigabytes",
    [("20b", 13.76e9, 20), ("120b", 65.25e9, 80)],
)
def test_one_card_holds_lora(size: str, published: float, gigabytes: int) -> None:
    """Of the size the task files name; the weights are as large as the published files."""
    held = count(make_config(size), LORA, max_length=4096, batch_size=1, packed=True)
    weights = held["experts"] + held["other weights, bf16"]
    assert weights == pytest.approx(published, rel=0.001)
    assert weights < held["peak"] < gigabytes * 1e9


def test_a_bf16_base_takes_four_times_the_memory() -> None:
    config, shape = make_config("20b", num_layers=2), {"max_length": 256, "batch_size": 1}
    packed, dense = (count(config, LORA, **shape, packed=packed) for packed in (True, False))
    assert dense["experts"] / packed["experts"] == pytest.approx(16 / 4.25)
    assert dense["its gradients"] == packed["its gradients"] > 0
