"""What the tests of the Slurm lab (lab.sh) share: a recipe made small, and commands that wait.

A wait ends when the event has come. It fails early when the event can no longer come, because the
managed job has ended, and after WAIT_SECONDS otherwise.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest

REPO = Path(__file__).resolve().parents[2]
REHEARSAL = REPO / "tests/rehearsal"
CONVERSATIONS = REHEARSAL / "conversations.jsonl"
BUCKET = "checkpoints"
WANDB_KEY = "0123456789abcdef" * 2 + "01234567"  # of the right form, and nobody's
S3_PORT = "46655"  # as lab.sh has it
NUM_RANKS = 2
STEPS = 18  # about one a second: a test that waits for a checkpoint has time to interfere
SCALED_DOWN = {  # the GPUs a node is asked for, the number of nodes, and the global batch
    "gpt-oss-20b-lora": ("H100:2", 1, 8),
    "gpt-oss-20b-sft": ("H100:2", 1, 2),
    "gpt-oss-120b-lora": ("H100:2", 1, 2),
    "gpt-oss-120b-sft": ("H200:1", 2, 2),
}
# A recovery and the rest of the training take about 90 s on an idle machine. A machine five times
# as busy still keeps well within this.
WAIT_SECONDS = 1800
# `sky jobs queue` costs seconds of CPU, which the job that is waited for needs too.
SECONDS_BETWEEN_JOB_CHECKS = 15

only_in_the_lab = [
    pytest.mark.sky,
    pytest.mark.skipif("SLURM_LAB" not in os.environ, reason="runs inside tests/sky/lab.sh"),
]


def run(*command: str, status: int = 0) -> str:
    """Both streams of a command, shown while it runs: pytest reports them with a failure."""
    with subprocess.Popen(
        command,
        cwd=REPO,
        env=os.environ | {"WANDB_API_KEY": WANDB_KEY},
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


def wait_until(condition: Callable[[], Any], *, interval: float = 2.0) -> None:
    """Return once the condition holds; fail after WAIT_SECONDS. interval: seconds."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {WAIT_SECONDS} seconds"
        time.sleep(interval)


def wait_for_job_to_reach(condition: Callable[[], Any], *, interval: float = 1.0) -> None:
    """wait_until for something only the newest managed job brings about: fail once it has ended."""
    # In the background, because a condition that holds for seconds only must not be missed.
    background = ThreadPoolExecutor(1)
    check, next_check = None, time.monotonic() + SECONDS_BETWEEN_JOB_CHECKS

    def reached() -> bool:
        nonlocal check, next_check
        if condition():
            return True
        if check is None and time.monotonic() > next_check:
            check = background.submit(newest_job)
        elif check is not None and check.done():
            job = check.result()
            # The condition may have come true between its check and the job's end.
            assert job["end_at"] is None or condition(), f"the job has ended: {job['status']}"
            check, next_check = None, time.monotonic() + SECONDS_BETWEEN_JOB_CHECKS
        return False

    try:
        wait_until(reached, interval=interval)
    finally:
        background.shutdown(wait=False)  # the caller acts at once, not when the queue was read


def newest_job() -> dict[str, Any]:
    """The newest managed job, as `sky jobs queue` reports it."""
    command = ["sky", "jobs", "queue", "-o", "json"]
    jobs = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return max(jobs, key=lambda job: job["job_id"])


def scaled_down_options(name: str, model: Path, *, save_steps: int = 3) -> list[str]:
    """The options of `sky launch` that make a recipe small enough for the lab."""
    gpus, num_nodes, global_batch_size = SCALED_DOWN[name]
    envs = {
        "GLOBAL_BATCH_SIZE": global_batch_size,
        "CHECKPOINT_BUCKET": f"s3://{BUCKET}",
        "MODEL": model,
        "DATASET": CONVERSATIONS,
        "TRAIN_ARGS": "--use_cpu true --max_length 512 --learning_rate 1e-2 "
        f"--max_steps {STEPS} --save_steps {save_steps}",
        "PYTHONPATH": REHEARSAL / "cpu",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    options = ["--infra", "slurm/lab", "--gpus", gpus, "--num-nodes", str(num_nodes)]
    for env, value in envs.items():
        options += ["--env", f"{env}={value}"]
    return options


def launch(
    name: str, model: Path, *options: str, task_file: Path | None = None, status: int = 0
) -> str:
    """`sky launch` a recipe, from its own task file by default, onto the cluster of its name."""
    command = f"sky launch -y -c {name} {task_file or f'{name}.yaml'}".split()
    return run(*command, *scaled_down_options(name, model), *options, status=status)


@contextmanager
def torn_down(name: str) -> Iterator[None]:
    """Take the only cluster down afterwards, and check that nothing of it is left."""
    try:
        yield
    finally:
        run("sky", "down", "-y", name)
    assert_nothing_is_left()


def assert_nothing_is_left() -> None:
    """No job of Slurm's, and no bucket mounted on a node. Waits for the nodes' epilogs."""
    wait_until(lambda: run("squeue", "--noheader") == "")
    nodes = run("sinfo", "--noheader", "--states=idle", "--format=%D").strip()
    assert "fuse" not in run("srun", f"--nodes={nodes}", "findmnt", "-rno", "TARGET,FSTYPE")


def job_status(cluster: str) -> str:
    """The status of a cluster's newest job, as `sky queue` reports it."""
    return re.findall(r'"status": "(\w+)"', run("sky", "queue", cluster, "-o", "json"))[0]


def job_log(cluster: str, job: int) -> str:
    """What a cluster's job has printed by now: its file, in the home that all machines share."""
    logs = Path.home().glob(f".sky_clusters/{cluster}-*/sky_logs/{job}-*/run.log")
    return "".join(log.read_text() for log in logs)


def loss_history(run_name: str) -> list[tuple[int, float]]:
    """Steps and losses of a finished run from the bucket, in full precision."""
    found = [key for key in object_sizes(f"{run_name}/") if key.endswith("/trainer_state.json")]
    key = f"{run_name}/{max(found, key=lambda key: step_of(key.split('/')[0]))}"
    state: dict[str, Any] = json.load(boto3.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"])
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


def object_sizes(prefix: str) -> dict[str, int]:
    """Bytes of each object of the bucket whose key starts with prefix, by key without it."""
    pages = (
        boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    )
    return {
        item["Key"].removeprefix(prefix): item["Size"]
        for page in pages
        for item in page.get("Contents", [])
    }


def last_node() -> str:
    """The last of the nodes that are in use."""
    nodes = run("squeue", "--noheader", "--format=%N").strip()
    return run("scontrol", "show", "hostnames", nodes).split()[-1]


def process_with(*words: str) -> psutil.Process:
    """The only process whose command line ends with these words."""
    (process,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[-len(words) :] == list(words)
    ]
    return process


def slurmd(node: str) -> psutil.Process:
    """The process that stands for a machine of the lab."""
    return process_with("-N", node)


def step_being_uploaded(node: str) -> int | None:
    """The step of a checkpoint with weights that the node's rclone has not uploaded, or None."""
    cache = Path(f"/proc/{slurmd(node).pid}/root/srv/local")
    for record in cache.glob("*/.cache/rclone/*/vfsMeta/**/checkpoint-*/*.distcp"):
        with suppress(OSError, ValueError):  # it has been deleted, or is being written
            if json.loads(record.read_text())["Dirty"]:
                return step_of(record.parent.name)
    return None


def step_of(checkpoint: str) -> int:
    """The step in the name of a checkpoint's folder, checkpoint-STEP or checkpoint-STEP.LAUNCH."""
    return int(checkpoint.removeprefix("checkpoint-").partition(".")[0])


@contextmanager
def suspended_during_upload(node: str, *, wait: Callable[..., None]) -> Iterator[int]:
    """The S3 server answers nobody while the weights of a checkpoint wait for their upload.

    wait: wait_until, or wait_for_job_to_reach. Yields its step. Its manifest cannot be in the
    bucket: it is written after their upload.
    """
    server = process_with("-p", S3_PORT)
    while True:
        # Rclone uploads a file about a second after it was written.
        wait(lambda: step_being_uploaded(node), interval=0.02)
        server.suspend()
        try:
            step = step_being_uploaded(node)  # None if the upload was faster: then the next one
            if step is not None:
                yield step
                return
        finally:
            server.resume()


def processes_running(script: str) -> list[psutil.Process]:
    """The Python processes of this script, on any of the lab's machines."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if script in (process.info["cmdline"] or [])[1:3] and process.is_running()
    ]
