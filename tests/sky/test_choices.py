"""The machine that SkyPilot's own optimizer takes for each recipe, in each of five clouds.

What the clouds offer is in tests/sky/catalogs. Kubernetes is not among them: SkyPilot asks a
cluster itself what it has.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SKY_TESTS = Path(__file__).resolve().parent
# The GPUs of one machine, or why there is none.
EXPECTED = {
    "gpt-oss-20b-lora": {
        "aws": "H100:1",  # EC2 has no two H100s
        "gcp": "H100:2",
        "lambda": "H100:2",
        "nebius": "H100:1",
        "runpod": "H100:2",
    },
    "gpt-oss-20b-sft": dict.fromkeys(("aws", "gcp", "lambda", "nebius", "runpod"), "H100:8"),
    "gpt-oss-120b-lora": dict.fromkeys(("aws", "gcp", "lambda", "nebius", "runpod"), "H100:8"),
    "gpt-oss-120b-sft": {
        "aws": "H200:8",
        "gcp": "H200:8",
        "lambda": "Custom network tier is currently not supported in Lambda",
        "nebius": "H200:8",
        "runpod": "Multi-node not supported yet",
    },
}
CASES = [(recipe, cloud) for recipe, clouds in EXPECTED.items() for cloud in clouds]


@pytest.fixture(scope="module")
def envs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With a HOME in which SkyPilot finds the small catalogs."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(SKY_TESTS / "catalogs", home / ".sky/catalogs/v8")
    return os.environ | {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}


@pytest.fixture(scope="module")
def choices(envs: dict[str, str]) -> dict[tuple[str, str], dict[str, Any]]:
    """What choices.py prints, by recipe and cloud."""
    clouds = list(EXPECTED["gpt-oss-20b-lora"])
    command = [sys.executable, SKY_TESTS / "choices.py", *clouds]
    result = subprocess.run(command, env=envs, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    return {(line["recipe"], line["cloud"]): line for line in map(json.loads, lines)}


@pytest.mark.parametrize(("recipe", "cloud"), CASES)
def test_each_recipe_finds_its_machine(
    recipe: str, cloud: str, choices: dict[tuple[str, str], dict[str, Any]]
) -> None:
    choice, expected = choices[recipe, cloud], EXPECTED[recipe][cloud]
    if "error" in choice:
        assert expected in choice["error"]
    else:
        assert choice["gpus"] == expected


def test_quoted_prices_are_those_of_the_optimizer(
    envs: dict[str, str], choices: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """What prices.py tells make quote, for each machine that the optimizer has taken."""
    found = [choice for choice in choices.values() if "error" not in choice]
    command = [sys.executable, SKY_TESTS.parents[1] / "sft/finetune/benchmark/prices.py"]
    command += ["--clouds", *{choice["cloud"] for choice in found}, "--"]
    command += {choice["gpus"] for choice in found}
    result = subprocess.run(command, env=envs, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["failed"] == {}
    prices = {(offer["cloud"], offer["accelerators"]): offer["price"] for offer in told["offers"]}
    for choice in found:
        nodes = 4 if choice["recipe"] == "gpt-oss-120b-sft" else 1
        price = nodes * prices[choice["cloud"], choice["gpus"]]
        assert price == pytest.approx(choice["dollars_per_hour"], abs=0.01), choice
