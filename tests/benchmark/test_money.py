"""What a run costs before it is launched: sizes and hours against figures got another way."""

import pytest
from trl import ModelConfig

from finetune.benchmark.money import Interruptions, cheapest, checkpoint_bytes
from finetune.benchmark.synthetic import make_config
from finetune.benchmark.traffic import count_parameters

LORA = ModelConfig(use_peft=True, lora_r=8, lora_alpha=16, lora_dropout=0.0)


def test_the_sizes_of_checkpoints() -> None:
    """From the published 20.9 B parameters, and the adapter's 92,454,912."""
    all_weights = count_parameters(make_config("20b"), ModelConfig())
    assert checkpoint_bytes(all_weights, lora=False) == pytest.approx(12 * 20.9e9, rel=0.01)
    adapter = count_parameters(make_config("20b"), LORA)
    assert checkpoint_bytes(adapter, lora=True) == 12 * 92_454_912


def test_an_interruption_costs_a_start_and_half_of_the_time_between_two_saves() -> None:
    """Eight hours, taken back every two: four times 15 minutes and 2.5."""
    spot = Interruptions(every=120, startup=15, between_saves=5)
    assert spot.hours(8.0) == pytest.approx(4 * 17.5 / 60)


def test_the_cheapest_offer_has_a_price() -> None:
    offers = [{"name": n, "dollars": d} for n, d in (("a", None), ("b", 3.0), ("c", 2.5))]
    assert cheapest(offers, "dollars") == offers[2]
    assert cheapest(offers[:1], "dollars") is None
