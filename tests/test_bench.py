"""The benchmark runs to its end on CPU; its figures mean something on a GPU only."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import CPU_ENVS, REPO


def test_both_paths_are_measured(tmp_path: Path) -> None:
    flags = "--tiny --max_length 64 --num_windows 1 --steps_per_window 1 --warmup_steps 1"
    result = subprocess.run(
        [sys.executable, str(REPO / "sft/bench.py"), *flags.split()]
        + ["--output", str(tmp_path / "bench.json"), "--trace", str(tmp_path / "traces")],
        env=os.environ | CPU_ENVS,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [measured["path"] for measured in report["results"]] == ["recipe", "stock"]
    for measured in report["results"]:
        for name in ("tokens_per_sec", "seconds_per_step", "attention", "experts", "saving"):
            assert measured[name] > 0, name
    assert "| tokens per sec |" in result.stdout
    assert {file.name for file in (tmp_path / "traces").iterdir()} == {"recipe.json", "stock.json"}
