"""`--help` answers at once, with every flag; a mistake is one line."""

import ast
import dataclasses
import os
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from finetune.arguments import check_spelling, training_parser
from finetune.command_line import TRAINING_FLAGS, declared_flags, one_line
from finetune.errors import UserError
from helpers.paths import CPU_ENVS, REPO

SCRIPTS = sorted(path.name for path in (REPO / "sft").glob("*.py"))
# torch alone takes two seconds to import on a quiet machine, trl eight.
HEAVY = ("torch", "transformers", "trl.trainer", "datasets", "wandb", "matplotlib")


def run_script(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPO / "sft" / name), *flags],
        env=os.environ | CPU_ENVS,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_imports_nothing_that_takes_seconds(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", str(REPO / "sft" / name), "--help"],
        env=os.environ | CPU_ENVS,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout and "(default: " in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "finetune.command_line" in imported
    assert not imported & set(HEAVY)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_within_three_seconds(name: str) -> None:
    def seconds() -> float:
        started = time.monotonic()
        assert run_script(name, "--help").returncode == 0
        return time.monotonic() - started

    assert min(seconds() for _ in range(3)) < 3  # the quickest: others share this machine


def test_help_of_training_lists_our_flags_first() -> None:
    printed = run_script("train.py", "--help").stdout.split("options:")[1]
    order = ["saving and resuming:", "  --save_every_minutes", "data and loss:", "  --train_on"]
    order += ["  --dataset_name", "  --lora_r", "  --learning_rate", "  --max_length"]
    positions = [printed.index(f"\n{text}") for text in order]
    assert positions == sorted(positions)


def test_help_of_training_shows_what_the_parser_takes() -> None:
    """The flags that are read from sources are those of the real parser, with its defaults."""
    actual: dict[str, str] = {}
    for group in TRAINING_FLAGS:
        for name, default, _ in declared_flags(group):
            actual.setdefault(name, default)
    expected = {
        field.name: field
        for dataclass_type in training_parser().dataclass_types
        for field in dataclasses.fields(dataclass_type)
        if field.init
    }
    assert actual.keys() == expected.keys()
    compared = 0
    for name, field in expected.items():
        with suppress(ValueError):  # a few defaults are names: an enum's member, a constant
            assert ast.literal_eval(actual[name]) == field.default, name
            compared += 1
    assert compared > 0.9 * len(expected)


@pytest.mark.parametrize(
    "name",
    # These two import TRL before they look at their flags.
    [
        pytest.param(name, marks=pytest.mark.slow) if name in ("train.py", "preflight.py") else name
        for name in SCRIPTS
    ],
)
def test_a_misspelt_flag_is_one_line(name: str) -> None:
    result = run_script(name, "--nonsense", "1", "x")
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert line.startswith("error: ")
    assert "usage:" not in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
        (["--train_on=nothing"], "--train_on: invalid choice: 'nothing'"),
        (["--lerning_rate=1"], "there is no flag --lerning_rate; did you mean --learning_rate?"),
        (["stray"], "there is no flag stray"),
    ],
)
def test_a_wrong_flag_of_training_is_one_line(flags: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        check_spelling(flags)
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_an_unknown_flag_is_compared_with_those_that_exist() -> None:
    known = ["--max_length", "--max_steps"]
    assert one_line("unrecognized arguments: --max_step=3", known) == (
        "there is no flag --max_step; did you mean --max_steps?"
    )
    assert one_line("unrecognized arguments: --zzz 3", known) == "there is no flag --zzz"
    assert one_line("argument --max_steps/--max-steps: invalid int value: 'x'", known) == (
        "--max_steps: invalid int value: 'x'"
    )
