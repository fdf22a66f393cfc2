"""What bounds a recipe on paper, against figures got another way."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from trl import ModelConfig

from finetune.benchmark.synthetic import make_config
from finetune.benchmark.traffic import Parameters, bytes_between_gpus, count_parameters
from finetune.errors import UserError
from helpers.paths import REPO, TASK_FILES
from helpers.task_files import PLACES, task_with_flag
from roofline import RooflineArguments, main, step_of

LORA = ModelConfig(use_peft=True, lora_r=8, lora_alpha=16, lora_dropout=0.0)
BOUNDS = {
    "gpt-oss-20b-lora": "computing",
    "gpt-oss-20b-sft": "moving",
    "gpt-oss-120b-lora": "computing",
    "gpt-oss-120b-sft": "moving",
}


def printed_rows(output: str) -> dict[str, list[str]]:
    return {
        cells[0]: cells[1:]
        for line in output.splitlines()
        if len(cells := re.findall(r"[^\s│|]+", line)) == 9 and cells[0] in BOUNDS
    }


@pytest.mark.slow
def test_every_recipe_is_bound_by_what_the_docstring_says() -> None:
    """Of 20b-sft the seconds too, from the published 20.9 B parameters."""
    result = subprocess.run(
        [sys.executable, str(REPO / "sft/roofline.py"), *map(str, TASK_FILES)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    rows = printed_rows(result.stdout)
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


@pytest.mark.parametrize("place", PLACES)
def test_a_larger_rank_moves_as_much_more_wherever_it_is_given(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, flag = "gpt-oss-20b-lora", "--lora_r 64"
    original = step_of(REPO / f"{name}.yaml", mfu=0.3)
    task = task_with_flag(name, flag, place, folder=tmp_path, monkeypatch=monkeypatch)
    assert step_of(task, mfu=0.3).moving == pytest.approx(8 * original.moving)  # r is 8 in the file
    main(RooflineArguments(), [task])
    assert printed_rows(capsys.readouterr().out)[name][3] == f"{8 * original.moving:.3f}"


def test_help_imports_neither_torch_nor_transformers() -> None:
    command = [sys.executable, "-X", "importtime", str(REPO / "sft/roofline.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "--mfu" in result.stdout
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


@pytest.mark.parametrize("mfu", [0.0, -0.3, 30.0, float("nan")])
def test_an_mfu_that_is_no_share_is_refused(mfu: float) -> None:
    with pytest.raises(UserError, match="--mfu"):
        main(RooflineArguments(mfu=mfu), TASK_FILES)


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
