"""A run made by earlier code is resumed, exported and evaluated by today's (see earlier_run/)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers.launching import launch_command
from helpers.paths import CPU_ENVS, REPO

EARLIER_RUN = Path(__file__).parent / "earlier_run"
# The flags that the run was made with; its record names the model and the data by relative paths.
FLAGS = (
    "--model_name_or_path=model",
    "--dataset_name=conversations.jsonl",
    "--output_dir=run",
    "--run_name=earlier",
    "--use_cpu=true",
    "--use_peft=true",
    "--lora_r=2",
    "--lora_alpha=16",
    "--lora_dropout=0",
    "--packing=true",
    "--max_length=512",
    "--truncate=true",
    "--max_steps=6",
    "--save_steps=3",
    "--eval_strategy=epoch",
    "--test_split_size=0.2",
    "--learning_rate=3e-2",
    "--activation_checkpointing=true",
    "--per_device_train_batch_size=1",
    "--per_device_eval_batch_size=1",
    "--logging_steps=1",
    "--disable_tqdm=true",
    "--resume_from_checkpoint=true",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The working directory of the earlier run: the model, the data, no run yet."""
    shutil.copytree(EARLIER_RUN / "model", tmp_path / "model")
    shutil.copy(EARLIER_RUN / "conversations.jsonl", tmp_path)
    return tmp_path


@pytest.fixture
def interrupted(folder: Path) -> Path:
    """The run as it was after step 3 of 6."""
    return shutil.copytree(EARLIER_RUN / "interrupted", folder / "run")


@pytest.fixture
def finished(folder: Path) -> Path:
    """The run as it was at its end."""
    return shutil.copytree(EARLIER_RUN / "finished", folder / "run")


def run_in(folder: Path, *command: str) -> str:
    """Run a command in the folder; its output."""
    result = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | CPU_ENVS,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def script(name: str) -> tuple[str, str]:
    """The command of one of today's scripts."""
    return sys.executable, str(REPO / "sft" / name)


def losses(file: Path) -> dict[int, float]:
    """The loss of each step in a trainer_state.json."""
    history = json.loads(file.read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def test_it_is_resumed_and_trained_to_its_end(folder: Path, interrupted: Path) -> None:
    output = run_in(folder, *launch_command("ddp.yaml", *FLAGS))
    assert "resuming from run/checkpoint-3" in output
    unbroken = losses(EARLIER_RUN / "unbroken_trainer_state.json")
    resumed = losses(interrupted / "checkpoint-6.0002/trainer_state.json")
    assert list(resumed) == list(unbroken) == [1, 2, 3, 4, 5, 6]
    # Another CPU rounds differently, and so do later products and sums in bf16. At this learning
    # rate every step makes more of it.
    assert resumed == pytest.approx(unbroken, rel=1e-3)
    summary = json.loads((interrupted / "final/summary.json").read_text())
    assert summary["interruptions"] == 1
    assert summary["run"].keys() == earlier_summary()["run"].keys()


def earlier_summary() -> dict[str, Any]:
    return json.loads((EARLIER_RUN / "finished/final/summary.json").read_text())


def test_its_interrupted_checkpoint_is_exported_as_an_adapter(
    folder: Path, interrupted: Path
) -> None:
    output = run_in(folder, *script("export.py"), "run", "--format=adapter", "--output=adapter")
    exported = load_file(folder / "adapter/adapter_model.safetensors")
    earlier = load_file(EARLIER_RUN / "finished/final/adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in exported.items()} == {
        name: tensor.shape for name, tensor in earlier.items()
    }
    assert "KL from the trained model" in output  # it was verified


@pytest.mark.long
def test_its_finished_artifact_is_exported_as_mxfp4(folder: Path, finished: Path) -> None:
    output = run_in(folder, *script("export.py"), "run", "--format=mxfp4", "--output=mxfp4")
    assert "KL from the trained model" in output
    config = json.loads((folder / "mxfp4/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"


@pytest.mark.long
def test_its_finished_artifact_is_evaluated(folder: Path, finished: Path) -> None:
    flags = ("--num_generations=1", "--max_new_tokens=8")
    run_in(folder, *script("evaluate.py"), "run", *flags)
    evaluation = json.loads((finished / "final/evaluation.json").read_text())
    assert evaluation["generated"] == 1
    before, after = evaluation["loss"]["overall"]["loss"]
    assert after < before
