"""The benchmark runs to its end on a CPU; its figures mean something on a GPU only."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from bench import check, parse
from finetune.benchmark.measure import time_parts
from finetune.benchmark.options import TINY_DEFAULTS, BenchArguments
from finetune.benchmark.results import ARGUMENTS, RESULT, TIMES, read_report, table
from finetune.benchmark.scale import scale
from finetune.errors import UserError
from helpers.paths import CPU_ENVS, REPO

BENCH = [sys.executable, str(REPO / "sft/bench.py")]
SHORT = ["--tiny", "--max_length=64", "--num_windows=1", "--steps_per_window=1"]
DEADLINE = 300  # seconds; a path starts in ten on an idle machine


def bench(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BENCH, *SHORT, *flags], env=os.environ | CPU_ENVS, capture_output=True, text=True
    )


def figures(num_layers: int) -> dict[str, Any]:
    """A second a step, and half of one a layer."""
    return {
        "path": f"recipe, {num_layers}-layer slice",
        "num_layers": num_layers,
        "tokens_per_step": 1300,
        "tokens_per_sec": 1300 / (1 + num_layers / 2),
        "peak_memory_gib": 10.0,
        **dict.fromkeys(TIMES, 1 + num_layers / 2),
    }


@pytest.mark.slow
def test_both_paths_are_measured_and_their_progress_is_printed(tmp_path: Path) -> None:
    result = bench("--output", str(tmp_path / "bench.json"), "--trace", str(tmp_path / "traces"))
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["device"] == "CPU" and report["args"]["max_length"] == 64
    assert [measured["path"] for measured in report["results"]] == ["recipe", "stock"]
    for measured in report["results"]:
        assert "failed" not in measured
        for name in ("tokens_per_sec", *TIMES):
            assert measured[name] > 0, name
    assert "| tokens per sec |" in result.stdout
    assert {file.name for file in (tmp_path / "traces").iterdir()} == {"recipe.json", "stock.json"}
    for path in ("recipe", "stock"):
        for step in ("starts", "warm-up: 1 steps", "window 1 of 1: ", "saving", "loss", "measured"):
            assert f"\n{path}: {step}" in f"\n{result.stderr}", step


@pytest.mark.slow
def test_all_weights_are_trained_by_accelerate_with_fsdp2_in_fp32(tmp_path: Path) -> None:
    flags = ["--use_peft", "false", "--num_layers", "1", "--paths", "recipe"]
    result = bench(*flags, "--output", str(tmp_path / "bench.json"))
    assert result.returncode == 0, result.stderr
    (measured,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert measured["path"] == "recipe, 1-layer slice"
    assert measured["trained_weights"] == "float32, FSDP2"
    assert all(measured[name] > 0 for name in TIMES), measured


@pytest.fixture
def endless() -> Iterator[list[subprocess.Popen[str]]]:
    """Benchmarks that a test has started; those that still run are killed with their children."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for benchmark in started:
        if benchmark.poll() is None:
            for process in psutil.Process(benchmark.pid).children(recursive=True):
                process.kill()
            benchmark.kill()
        benchmark.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    "use_peft, signum, status", [(False, signal.SIGTERM, 143), (True, signal.SIGINT, 130)]
)
def test_a_signal_ends_the_benchmark_and_every_process_it_started(
    endless: list[subprocess.Popen[str]],
    tmp_path: Path,
    use_peft: bool,
    signum: int,
    status: int,
) -> None:
    flags = ["--num_windows=500", f"--use_peft={use_peft}", "--paths=recipe"]
    benchmark = subprocess.Popen(
        [*BENCH, *SHORT, *flags],
        env=os.environ | CPU_ENVS | {"TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    endless.append(benchmark)
    assert benchmark.stderr is not None
    lines = []
    for line in benchmark.stderr:
        lines.append(line)
        if line.startswith("recipe: window 2 of"):
            break
    else:
        pytest.fail("".join(lines))
    descendants = psutil.Process(benchmark.pid).children(recursive=True)
    assert len(descendants) >= (1 if use_peft else 2)  # accelerate's launcher has one of its own
    benchmark.send_signal(signum)
    started = time.monotonic()
    assert benchmark.wait(timeout=DEADLINE) == status
    assert time.monotonic() - started < 30
    gone, alive = psutil.wait_procs(descendants, timeout=DEADLINE)
    assert not alive
    assert not list(tmp_path.rglob(ARGUMENTS))  # the path's folder, with its checkpoint, is deleted


def test_help_imports_neither_torch_nor_transformers() -> None:
    command = [sys.executable, "-X", "importtime", str(REPO / "sft/bench.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "--max_length" in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "finetune.benchmark.options" in imported
    assert not imported & {"torch", "transformers", "datasets"}


def test_tiny_takes_smaller_defaults_but_not_over_flags_that_are_given() -> None:
    args, _ = parse(["--tiny", "--max_length", "4096"])
    assert vars(args) == vars(BenchArguments(tiny=True)) | TINY_DEFAULTS | {"max_length": 4096}
    args, _ = parse([])
    assert args == BenchArguments()


def test_a_part_that_fails_is_named_and_costs_no_other_figure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> float:
        raise RuntimeError("no space\nsecond line")

    result = figures(2) | dict.fromkeys(("saving", "attention", "loss"))
    written: list[dict[str, Any]] = []
    time_parts(
        {"saving": fail, "attention": lambda: 0.12345, "trace": lambda: None, "loss": fail},
        result=result,
        write=lambda figures: written.append(dict(figures)),
    )
    assert result["tokens_per_sec"] == 650 and result["attention"] == 0.1235
    assert result["saving"] is None and result["loss"] is None and "trace" not in result
    assert result["failed"] == "saving: RuntimeError: no space; loss: RuntimeError: no space"
    assert written[0]["attention"] is None and written[-1] == result  # after every part
    assert "Traceback" in capsys.readouterr().err


def test_a_path_that_is_killed_leaves_what_it_had_measured(tmp_path: Path) -> None:
    result = figures(2) | {"attention": None, "experts": None, "loss": None}
    text = json.dumps({"device": "CPU", "torch": "2", "result": result})
    (tmp_path / RESULT).write_text(text)
    report = read_report(tmp_path, name="recipe", status=-signal.SIGKILL)
    assert report["result"].pop("failed") == (
        "attention: not measured; experts: not measured; loss: not measured; "
        "its process ended: killed by SIGKILL"
    )
    assert report["result"] == result
    nothing = read_report(tmp_path / "nowhere", name="recipe", status=1)
    assert nothing["result"] == {"path": "recipe", "failed": "its process ended: exit status 1"}


def test_two_numbers_of_layers_are_scaled_to_all() -> None:
    few, more = figures(1), figures(3) | {"saving": None, "failed": "saving: out of memory"}
    scaled = scale(BenchArguments(), "recipe", few, more)
    assert scaled["path"] == "recipe, scaled to 24 layers"
    assert scaled["seconds_per_step"] == 13 and scaled["tokens_per_sec"] == 100
    assert scaled["peak_memory_gib"] is None
    assert scaled["saving"] is None and "failed" not in scaled
    failed = scale(BenchArguments(), "recipe", few, {"path": "recipe", "failed": "out of memory"})
    assert failed == {"path": "recipe, scaled to 24 layers", "failed": "not measured"}


@pytest.mark.parametrize("is_first", [True, False])
def test_a_path_that_failed_keeps_its_column(is_first: bool) -> None:
    results = [figures(1), {"path": "stock", "failed": "a | b"}]
    shown = table(results[::-1] if is_first else results).splitlines()
    assert shown[0] == (
        "| | stock | recipe, 1-layer slice |" if is_first else "| | recipe, 1-layer slice | stock |"
    )
    assert ("| failed | a \\| b | - |" if is_first else "| failed | - | a \\| b |") in shown
    assert all(line.replace("\\|", "").count("|") == 4 for line in shown)


def test_an_unknown_path_is_named_in_one_line() -> None:
    result = bench("--paths", "nonsense")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error:") and "nonsense" in line and "stock_packed" in line


@pytest.mark.parametrize("counts", [[0], [2, 2], [1, 2, 3]])
def test_layers_that_cannot_be_scaled_are_refused(counts: list[int]) -> None:
    with pytest.raises(UserError, match="--num_layers"):
        check(BenchArguments(num_layers=counts))
