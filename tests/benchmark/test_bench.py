"""The benchmark runs to its end on CPU; its figures mean something on a GPU only."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import scale, show
from finetune.benchmark.variants import BenchArguments
from helpers.paths import CPU_ENVS, REPO

SHORT = "--tiny --max_length 64 --num_windows 1 --steps_per_window 1 --warmup_steps 1"
PARTS = ("seconds_per_step", "attention", "experts", "loss", "optimizer", "saving")


def bench(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPO / "sft/bench.py"), *SHORT.split(), *flags],
        env=os.environ | CPU_ENVS,
        capture_output=True,
        text=True,
    )


def test_both_paths_are_measured(tmp_path: Path) -> None:
    result = bench("--output", str(tmp_path / "bench.json"), "--trace", str(tmp_path / "traces"))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [measured["path"] for measured in report["results"]] == ["recipe", "stock"]
    for measured in report["results"]:
        for name in ("tokens_per_sec", *PARTS):
            assert measured[name] > 0, name
    assert "| tokens per sec |" in result.stdout
    assert {file.name for file in (tmp_path / "traces").iterdir()} == {"recipe.json", "stock.json"}


def test_all_weights_are_trained_as_the_recipe_trains_them(tmp_path: Path) -> None:
    """By accelerate with fsdp2.yaml, which keeps weights in fp32."""
    flags = ["--use_peft", "false", "--num_layers", "1", "--paths", "recipe"]
    result = bench(*flags, "--output", str(tmp_path / "bench.json"))
    assert result.returncode == 0, result.stderr
    (measured,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert measured["trained_weights"] == "float32, FSDP2"
    assert all(measured[name] > 0 for name in PARTS), measured


def measured(num_layers: int) -> dict[str, Any]:
    """A second a step, and half of one a layer."""
    return {
        "path": f"recipe, {num_layers} layers",
        "num_layers": num_layers,
        "tokens_per_step": 1300,
        "peak_memory_gib": 10.0,
        **dict.fromkeys(PARTS, 1 + num_layers / 2),
    }


def test_two_numbers_of_layers_are_scaled_to_all() -> None:
    scaled = scale(BenchArguments(), "recipe", measured(1), measured(3))
    assert scaled["path"] == "recipe, scaled to 24 layers"
    assert scaled["seconds_per_step"] == 13 and scaled["tokens_per_sec"] == 100
    assert scaled["peak_memory_gib"] is None


def test_a_path_that_failed_keeps_its_column(capsys: pytest.CaptureFixture[str]) -> None:
    show([measured(1), {"path": "stock", "failed": "out of memory"}])
    assert "| failed | - | out of memory |" in capsys.readouterr().out


def test_an_unknown_path_is_named_in_one_line() -> None:
    result = bench("--paths", "nonsense")
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "nonsense" in line and "stock_packed" in line
    assert "Traceback" not in result.stderr
