"""train.py started as the task files start it, and what its output says."""

import ast
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.paths import CONVERSATIONS

Launch = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]
LORA = ("ddp.yaml", "--use_peft=true", "--lora_r=4", "--lora_dropout=0", "--learning_rate=3e-2")


def finish(launcher: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a launcher's end and hold what it printed."""
    stdout, stderr = launcher.communicate(timeout=1500)
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, stdout, stderr)


def defaults(model: Path, output_dir: Path) -> list[str]:
    """Flags of a run of four short steps."""
    return [
        f"--model_name_or_path={model}",
        f"--dataset_name={CONVERSATIONS}",
        f"--output_dir={output_dir / 'run'}",
        "--run_name=test",
        "--use_cpu=true",
        "--packing=true",
        "--max_length=256",
        "--truncate=true",
        "--max_steps=4",
        "--save_steps=2",
        "--learning_rate=1e-2",
        "--activation_checkpointing=true",
        "--per_device_train_batch_size=1",
        "--logging_steps=1",
        "--disable_tqdm=true",
        "--resume_from_checkpoint=true",
    ]


def await_event(happened: Callable[[], Any], launcher: subprocess.Popen[Any]) -> None:
    """Until it has happened, or the launcher has ended."""
    deadline = time.monotonic() + 600
    while not happened() and launcher.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def losses(output: str) -> list[float]:
    entries = [line for line in output.splitlines() if line.startswith("{'loss'")]
    return [float(ast.literal_eval(entry)["loss"]) for entry in entries]
