"""The four task files, unmodified, through `sky launch` onto a real Slurm cluster (lab.sh).

A node's GPUs are pretended: what the files ask for is scaled down on the command line and trains a
tiny gpt-oss on CPU. Provisioning, file mounts, the bucket, setup, ranks, logs, status and teardown
are SkyPilot's own.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest

REPO = Path(__file__).resolve().parents[2]
REHEARSAL = REPO / "tests/rehearsal"
CONVERSATIONS = REHEARSAL / "conversations.jsonl"
BUCKET = "checkpoints"
KEY = "0123456789abcdef" * 2 + "01234567"
NUM_RANKS = 2
STEPS = 12
SCALED_DOWN = {
    "gpt-oss-20b-lora": ("H100:2", 1),
    "gpt-oss-20b-sft": ("H100:2", 1),
    "gpt-oss-120b-lora": ("H100:2", 1),
    "gpt-oss-120b-sft": ("H200:1", 2),
}

pytestmark = [
    pytest.mark.sky,
    pytest.mark.skipif("SLURM_LAB" not in os.environ, reason="runs inside tests/sky/lab.sh"),
]


@pytest.fixture(scope="module")
def model() -> Path:
    """A tiny gpt-oss in the home that login host and nodes share, made by the training stack."""
    folder = Path.home() / "tiny-gpt-oss"
    python = os.environ.get("TRAIN_PYTHON", REPO / ".venv/train/bin/python")
    command = [python, REHEARSAL / "tiny_gpt_oss.py", folder, CONVERSATIONS]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture(scope="module", autouse=True)
def bucket() -> None:
    boto3.client("s3").create_bucket(Bucket=BUCKET)


def run(*command: str, status: int = 0) -> str:
    """Both streams of a command, shown as it runs: pytest reports them with a failure."""
    with subprocess.Popen(
        command,
        cwd=REPO,
        env=os.environ | {"WANDB_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            sys.stdout.write(line)
            lines.append(line)
    assert process.returncode == status, f"{command} ended with {process.returncode}"
    return "".join(lines)


def launch(
    name: str, model: Path, *options: str, task_file: Path | None = None, status: int = 0
) -> str:
    """`sky launch` of a task file, by default name's own, onto the cluster of that name."""
    command = f"sky launch -y -c {name} {task_file or f'{name}.yaml'}".split()
    return run(*command, *scaled_down(name, model), *options, status=status)


def scaled_down(name: str, model: Path) -> list[str]:
    """The options that make a recipe one for the lab."""
    gpus, num_nodes = SCALED_DOWN[name]
    envs = {
        "CHECKPOINT_BUCKET": BUCKET,
        "MODEL": model,
        "DATASET": CONVERSATIONS,
        "TRAIN_ARGS": "--use_cpu true --max_length 512 --learning_rate 1e-2 "
        f"--max_steps {STEPS} --save_steps 3",
        "PYTHONPATH": REHEARSAL / "cpu",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    options = ["--infra", "slurm/lab", "--gpus", gpus, "--num-nodes", str(num_nodes)]
    for env, value in envs.items():
        options += ["--env", f"{env}={value}"]
    return options


@contextmanager
def torn_down(name: str) -> Iterator[None]:
    """Take the cluster down afterwards; nothing of it may be left, and it is the only one."""
    try:
        yield
    finally:
        run("sky", "down", "-y", name)
    assert_nothing_is_left()


def assert_nothing_is_left() -> None:
    assert run("squeue", "--noheader") == ""
    nodes = run("sinfo", "--noheader", "--states=idle", "--format=%D").strip()
    assert "fuse" not in run("srun", f"--nodes={nodes}", "findmnt", "-rno", "TARGET,FSTYPE")


def job_status(cluster: str) -> str:
    """Of the newest job, as `sky queue` has it."""
    return re.findall(r'"status": "(\w+)"', run("sky", "queue", cluster, "-o", "json"))[0]


def history(run_name: str) -> list[tuple[int, float]]:
    """Steps and losses of a finished run, in full precision, as the bucket has them."""
    key = f"{run_name}/checkpoint-{STEPS}/trainer_state.json"
    state: dict[str, Any] = json.load(boto3.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"])
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


def stored(prefix: str) -> set[str]:
    """The keys below prefix in the bucket, without it."""
    pages = (
        boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    )
    return {item["Key"].removeprefix(prefix) for page in pages for item in page.get("Contents", [])}


@pytest.mark.parametrize("name", SCALED_DOWN)
def test_recipe(name: str, model: Path) -> None:
    with torn_down(name):
        launch(name, model)
        assert job_status(name) == "SUCCEEDED"
        log = run("sky", "logs", name, "1", "--no-follow")
    assert log.count("{'loss'") == STEPS
    assert history(name)[-1][1] < history(name)[0][1]
    assert f"processes: {NUM_RANKS}" in log

    keys = stored(f"{name}/")
    weights = "adapter_model.safetensors" if name.endswith("lora") else "model.safetensors"
    assert {f"final/{weights}", "final/tokenizer.json", "final/summary.json"} <= keys
    assert {f"checkpoint-{STEPS}/rng_state_{rank}.pth" for rank in range(NUM_RANKS)} <= keys
    assert {f"checkpoint-{STEPS}/__{rank}_0.distcp" for rank in range(NUM_RANKS)} <= keys
    assert f"checkpoint-{STEPS}/manifest.json" in keys


def test_without_a_bucket_and_without_a_model(model: Path, tmp_path: Path) -> None:
    """As the file says: an empty CHECKPOINT_BUCKET, and the three /checkpoints lines gone.

    Checkpoints stay on the node; training that fails is a job that fails.
    """
    name = "gpt-oss-20b-lora"
    lines = (REPO / f"{name}.yaml").read_text().splitlines()
    first = lines.index("  /checkpoints:")
    task_file = tmp_path / "no-bucket.yaml"
    task_file.write_text("\n".join(lines[:first] + lines[first + 3 :]))
    no_bucket = ["--env", "CHECKPOINT_BUCKET="]
    with torn_down(name):
        launch(name, model, *no_bucket, task_file=task_file)
        assert job_status(name) == "SUCCEEDED"
        files = run("sky", "exec", name, f"ls /checkpoints/{name}/final")
        assert "adapter_model.safetensors" in files and "summary.json" in files

        again = launch(name, model / "nowhere", *no_bucket, task_file=task_file, status=100)
        assert job_status(name) == "FAILED"
    # The second time, setup has found everything in its place.
    assert re.search(r"Checked \d+ packages", again) and "Installed" not in again
