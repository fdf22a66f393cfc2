"""What bounds a recipe on paper, against figures got another way."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from trl import ModelConfig

from finetune.benchmark.fake_model import UNPACKING_PART
from finetune.benchmark.op_count import GROUPED_PART, Cost
from finetune.benchmark.step import MOVING, Step
from finetune.benchmark.synthetic import make_config
from finetune.benchmark.traffic import Parameters, bytes_between_gpus, count_parameters
from finetune.errors import UserError
from helpers.paths import REPO, TASK_FILES
from helpers.task_files import PLACES, task_with_flag
from roofline import RooflineArguments, count_file, main

LORA = ModelConfig(use_peft=True, lora_r=8, lora_alpha=16, lora_dropout=0.0)
BOUNDS = {
    "gpt-oss-20b-lora": GROUPED_PART,
    "gpt-oss-20b-sft": GROUPED_PART,
    "gpt-oss-120b-lora": UNPACKING_PART,
    "gpt-oss-120b-sft": MOVING,
}
# Tokens/s/GPU that the step of each recipe allows; a change that takes time from a step, or adds to
# it, moves one of them. docs/hardware-and-cost.md has all parts.
RATES = {
    "gpt-oss-20b-lora": 24_525,
    "gpt-oss-20b-sft": 17_781,
    "gpt-oss-120b-lora": 7_027,
    "gpt-oss-120b-sft": 5_798,
}


def step_of(path: Path) -> Step:
    return count_file(path, RooflineArguments())


@pytest.fixture(scope="module")
def steps() -> dict[str, Step]:
    """Of every recipe; they take twenty seconds together."""
    return {path.stem: step_of(path) for path in TASK_FILES}


@pytest.mark.slow
def test_every_recipe_is_bound_as_the_docstring_says_and_no_slower_than_before(
    steps: dict[str, Step],
) -> None:
    assert {name: step.bound for name, step in steps.items()} == BOUNDS
    assert {name: step.tokens_per_sec for name, step in steps.items()} == pytest.approx(
        RATES, rel=0.01
    )


@pytest.mark.slow
def test_a_step_agrees_with_the_published_numbers_of_parameters(steps: dict[str, Step]) -> None:
    """20.9 billion, of which a token meets 3.6 billion."""
    full, lora = steps["gpt-oss-20b-sft"], steps["gpt-oss-20b-lora"]
    # All weights twice in bf16 but for the head, which is gathered once, and once in fp32.
    gathered_and_reduced = 20.9e9 * (2 * 2 + 4) - 201088 * 2880 * 2
    moving = gathered_and_reduced * 7 / 8 / (450e9 * 0.8)
    assert full.moving == pytest.approx(moving, rel=0.01)
    tokens = 2 * 4096
    # 8 FLOPs for each weight: 2 in the forward, in its recomputation, and for two gradients. What
    # is not recomputed takes a little away; the router and attention's own products add as little.
    assert full.microbatch.flops == pytest.approx(8 * 3.6e9 * tokens, rel=0.08)
    # Each weight is read as 17/32 of a byte and written as two: gate_up's three times, and down's,
    # which are half as many and not recomputed, twice.
    unpacked = (3 * 2 + 2) * 24 * 32 * 2880 * 2880 * (17 / 32 + 2)
    assert lora.parts[UNPACKING_PART].bytes == pytest.approx(unpacked, rel=1e-6)
    assert lora.seconds_of(UNPACKING_PART) == pytest.approx(unpacked / 3.35e12, rel=1e-6)


@pytest.mark.slow
def test_within_the_product_120b_is_not_bound_by_unpacking(steps: dict[str, Step]) -> None:
    (path,) = (path for path in TASK_FILES if path.stem == "gpt-oss-120b-lora")
    step = count_file(path, RooflineArguments(unpacks_in_product=True))
    before = steps[path.stem].parts[GROUPED_PART]
    assert step.parts[UNPACKING_PART] == Cost()
    assert step.parts[GROUPED_PART].flops == pytest.approx(before.flops, rel=1e-6)
    # Each weight is read as 17/32 of a byte, gate_up's three times and down's twice. The rows that
    # go in and come out are the same.
    weights = 36 * 128 * 2880 * 2880
    rows = before.bytes - (3 * 2 + 2) * weights * 2
    packed = (3 * 2 + 2) * weights * 17 / 32
    assert step.parts[GROUPED_PART].bytes == pytest.approx(packed + rows, rel=1e-3)
    assert step.microbatch.waits == 2  # without those for the rows of each chunk of experts
    assert step.tokens_per_sec == pytest.approx(17_083, rel=0.01)


@pytest.mark.parametrize("place", PLACES)
def test_a_larger_rank_moves_as_much_more_wherever_it_is_given(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, flag = "gpt-oss-20b-lora", "--lora_r 64"
    task = task_with_flag(name, flag, place, folder=tmp_path, monkeypatch=monkeypatch)
    make_config("20b", num_layers=1).save_pretrained(tmp_path / "model")  # counted in seconds
    task.write_text(task.read_text().replace("openai/gpt-oss-20b ", f"{tmp_path / 'model'} "))
    main(RooflineArguments(max_length=64), [task])
    (row,) = (line for line in capsys.readouterr().out.splitlines() if MOVING in line)
    adapter = 8 * 92_454_912 / 24  # of one layer; r is 8 in the file
    moving = 2 * 4 * adapter / 2 / (450e9 * 0.8)
    assert f" {1e3 * moving:.1f} " in row


def test_help_imports_neither_torch_nor_transformers() -> None:
    command = [sys.executable, "-X", "importtime", str(REPO / "sft/roofline.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "--gpu" in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "finetune.command_line" in imported
    assert not imported & {"torch", "transformers", "datasets"}


@pytest.mark.parametrize(
    "file, reason",
    [
        ("nowhere.yaml", "FileNotFoundError"),
        ("README.md", "ScannerError"),
        ("sft/ddp.yaml", "KeyError"),  # YAML, but no task
        ("sft/serve.yaml", ""),  # a task, but not one that trains
    ],
)
def test_a_file_that_is_no_task_of_this_repository_is_named_in_one_line(
    file: str, reason: str
) -> None:
    with pytest.raises(UserError, match=f"{file} is no task file like those .*{reason}") as error:
        main(RooflineArguments(), [REPO / file])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "args, reason",
    [
        (RooflineArguments(gpu="T4"), "the speed of T4 is not known here, but of A100, H100"),
        (RooflineArguments(max_length=0), "--max_length 0 must be at least 1"),
    ],
)
def test_a_flag_that_cannot_be_counted_is_refused(args: RooflineArguments, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        main(args, TASK_FILES)


@pytest.mark.parametrize(
    ("size", "billions", "adapter"), [("20b", 20.9, 92_454_912), ("120b", 116.8, 536_813_568)]
)
def test_parameters_are_those_of_the_model_card_and_of_the_shapes(
    size: str, billions: float, adapter: int
) -> None:
    """LoRA's A and B of a weight (in, out) have r * (in + out) parameters."""
    config = make_config(size)
    parameters = count_parameters(config, LORA)
    assert parameters.model / 1e9 == pytest.approx(billions, abs=0.06)
    hidden, width = config.hidden_size, config.intermediate_size
    attention = 2 * (hidden + 64 * 64) + 2 * (hidden + 8 * 64)
    experts = config.num_local_experts * (hidden + 2 * width + width + hidden)
    assert parameters.adapter == config.num_hidden_layers * 8 * (attention + experts) == adapter


def test_a_smaller_lora_target_is_a_smaller_adapter() -> None:
    config = make_config("20b", tiny=True)
    attention_only = replace(LORA, lora_target_modules=["q_proj"])
    assert count_parameters(config, attention_only).adapter > 0
    assert count_parameters(config, attention_only).adapter < count_parameters(config, LORA).adapter
    assert count_parameters(config, ModelConfig()).adapter == 0


def test_data_parallel_lora_all_reduces_its_adapter_in_fp32() -> None:
    parameters = Parameters(layers=1000, embedding=100, head=100, adapter=10)
    assert bytes_between_gpus(parameters, sharded=False, lora=True) == 2 * 4 * 10
