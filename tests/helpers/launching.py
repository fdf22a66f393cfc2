"""Flags for short runs of train.py, waiting for them, and reading the losses they print."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.paths import CONVERSATIONS, REPO
from rehearse import LOGGED_STEP

Launch = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]
# Seconds. A launch takes a minute at most on an idle machine with two cores; CI's is a busy one.
LONGEST_RUN = 1500
LONGEST_WAIT = 600
LORA = ("ddp.yaml", "--use_peft=true", "--lora_r=4", "--lora_dropout=0", "--learning_rate=3e-2")


def launch_command(
    config: str, *flags: str, num_processes: int = 2, script: Path = REPO / "sft/train.py"
) -> list[str]:
    """The command that starts a script under `accelerate launch` with one of sft/'s configs."""
    return [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        f"--config_file={REPO / 'sft' / config}",
        "--num_machines=1",
        f"--num_processes={num_processes}",
        "--main_process_port=0",
        str(script),
        *flags,
    ]


def finish(launcher: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait until a launcher ends; return its exit status and both streams."""
    stdout, stderr = launcher.communicate(timeout=LONGEST_RUN)
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, stdout, stderr)


def defaults(model: Path, output_dir: Path) -> list[str]:
    """The flags of a run of four short steps."""
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
    """Return once the event has happened, or the launcher has ended and it no longer can."""
    deadline = time.monotonic() + LONGEST_WAIT
    while not happened() and launcher.poll() is None:
        assert time.monotonic() < deadline, f"still waiting after {LONGEST_WAIT} seconds"
        time.sleep(0.002)


def losses(output: str) -> list[float]:
    """The training losses that a run printed, one for each logged step."""
    steps = [LOGGED_STEP.match(line) for line in output.splitlines()]
    return [float(step["loss"]) for step in steps if step]
