"""The machine that SkyPilot's own optimizer takes for each recipe, in each of five clouds and in a
Kubernetes cluster. What they offer is in tests/sky/catalogs.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kubernetes_api import cluster

SKY_TESTS = Path(__file__).resolve().parent
PLACES = ("aws", "gcp", "kubernetes", "lambda", "nebius", "runpod")
# The GPUs of one machine, or why there is none.
EXPECTED = {
    "gpt-oss-20b-lora": {
        "aws": "H100:1",  # EC2 has no two H100s
        "gcp": "H100:2",
        "kubernetes": "H100:2",
        "lambda": "H100:2",
        "nebius": "H100:1",
        "runpod": "H100:2",
    },
    "gpt-oss-20b-sft": dict.fromkeys(PLACES, "H100:8"),
    "gpt-oss-120b-lora": dict.fromkeys(PLACES, "H100:8"),
    "gpt-oss-120b-sft": {
        "aws": "H200:8",
        "gcp": "H200:8",
        "kubernetes": "Custom network tier is not supported in this Kubernetes cluster",
        "lambda": "Custom network tier is currently not supported in Lambda",
        "nebius": "H200:8",
        "runpod": "Multi-node not supported yet",
    },
}
CASES = [(recipe, cloud) for recipe, clouds in EXPECTED.items() for cloud in clouds]


@pytest.fixture(scope="module")
def envs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """With a HOME in which SkyPilot finds the small catalogs, and the way to the cluster."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(SKY_TESTS / "catalogs", home / ".sky/catalogs/v8")
    with cluster(home):
        yield os.environ | {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}


@pytest.fixture(scope="module")
def choices(envs: dict[str, str]) -> dict[tuple[str, str], dict[str, Any]]:
    """What the optimizer takes, by recipe and cloud."""
    return ask(envs, *PLACES)


def ask(envs: dict[str, str], *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What choices.py prints, by recipe and cloud."""
    command = [sys.executable, SKY_TESTS / "choices.py", *arguments]
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


def test_the_fast_network_is_what_a_plain_cluster_lacks(envs: dict[str, str]) -> None:
    choice = ask(envs, "--network-tier", "standard", "kubernetes")["gpt-oss-120b-sft", "kubernetes"]
    assert choice["gpus"] == "H200:8"


def test_quoted_prices_are_those_of_the_optimizer(
    envs: dict[str, str], choices: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """What prices.py tells make quote, for each machine that the optimizer has taken."""
    found = [choice for choice in choices.values() if choice.get("dollars_per_hour")]
    assert {choice["cloud"] for choice in found} == {*PLACES} - {"kubernetes"}  # it has no prices
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
