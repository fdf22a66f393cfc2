"""What bounds a recipe on paper, against figures got another way."""

import re
import subprocess
import sys

import pytest
from transformers import GptOssForCausalLM

from finetune.benchmark.synthetic import make_config
from helpers.paths import REPO, TASK_FILES
from roofline import Parameters, bytes_moved, count_parameters

BOUNDS = {
    "gpt-oss-20b-lora": "computing",
    "gpt-oss-20b-sft": "moving",
    "gpt-oss-120b-lora": "unpacking",
    "gpt-oss-120b-sft": "moving",
}


def test_every_recipe_has_its_bound() -> None:
    """As the docstring says; of 20b-sft the seconds too, from the published 20.9 B parameters."""
    result = subprocess.run(
        [sys.executable, str(REPO / "sft/roofline.py"), *map(str, TASK_FILES)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows = {
        cells[0]: cells[1:]
        for line in result.stdout.splitlines()
        if len(cells := re.findall(r"[^\s│|]+", line)) == 9 and cells[0] in BOUNDS
    }
    assert {name: cells[4] for name, cells in rows.items()} == BOUNDS
    # All weights twice in bf16 but for the head, which is gathered once, and once in fp32.
    gathered_and_reduced = 20.9e9 * (2 * 2 + 4) - 201088 * 2880 * 2
    moving = gathered_and_reduced * 7 / 8 / (450e9 * 0.8)
    assert float(rows["gpt-oss-20b-sft"][3]) == pytest.approx(moving, abs=0.01)
    # The model card's 3.6 B active parameters, 6 FLOPs each; attention adds a few per cent.
    computing = 6 * 3.6e9 * 4096 / (0.3 * 989e12)
    assert float(rows["gpt-oss-20b-sft"][1]) == pytest.approx(computing, rel=0.08)
    assert float(rows["gpt-oss-20b-sft"][5].replace(",", "")) == pytest.approx(
        4096 / moving, rel=0.02
    )


def test_parameters_are_the_models() -> None:
    config = make_config("20b", tiny=True)
    counted = count_parameters(config, lora_r=8).model
    assert counted == GptOssForCausalLM(config).num_parameters()


def test_an_adapter_is_reduced_and_gathered() -> None:
    parameters = Parameters(layers=1000, embedding=100, head=100, adapter=10)
    assert bytes_moved(parameters, sharded=False, lora=True) == 2 * 4 * 10
