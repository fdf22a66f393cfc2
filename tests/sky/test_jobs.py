"""Task files through `sky jobs launch`, in the lab of test_launch.py: SkyPilot recovers them.

Nobody launches again, and the losses are those of a run that nothing happened to.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import test_launch
from test_launch import BUCKET, KEY, history, launch, run, scaled_down, stored

LAST_FILE = "manifest.json"  # of a checkpoint: with it the checkpoint is whole
S3_PORT = "46655"
SECONDS = 900  # a recovery and the rest of the training take about 90 on an idle machine

pytestmark = test_launch.pytestmark
model = test_launch.model
bucket = test_launch.bucket


@pytest.fixture(autouse=True)
def state_of_the_lab() -> Iterator[None]:
    """What to read when a job did not recover; pytest shows it with a failure."""
    yield
    run("sinfo", "-R")
    run("squeue")
    for log in sorted((Path.home() / "sky_logs/jobs_controller").glob("[0-9]*.log")):
        print(log, *log.read_text().splitlines()[-60:], sep="\n")


def newest_job() -> dict[str, Any]:
    """As `sky jobs queue` has it."""
    command = ["sky", "jobs", "queue", "-o", "json"]
    jobs = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return max(jobs, key=lambda job: job["job_id"])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {SECONDS} seconds"
        time.sleep(2)


def await_checkpoint(run_name: str, step: int) -> None:
    boto3.client("s3").get_waiter("object_exists").wait(
        Bucket=BUCKET,
        Key=f"{run_name}/checkpoint-{step}/{LAST_FILE}",
        WaiterConfig={"Delay": 1, "MaxAttempts": 180},
    )


def process_with(*words: str) -> psutil.Process:
    """The only one whose command line ends with these."""
    (process,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[-len(words) :] == list(words)
    ]
    return process


def slurmd(node: str) -> psutil.Process:
    """The process that stands for a machine of the lab."""
    return process_with("-N", node)


def processes_of(node: str) -> list[psutil.Process]:
    """Those that see the files the machine's slurmd sees."""
    files = os.readlink(f"/proc/{slurmd(node).pid}/ns/mnt")
    found = []
    for process in psutil.process_iter():
        with suppress(OSError):
            if os.readlink(f"/proc/{process.pid}/ns/mnt") == files:
                found.append(process)
    return found


@contextmanager
def bucket_stands_still() -> Iterator[None]:
    """The S3 server answers nobody; the node's rclone uploads what it holds when it can."""
    server = process_with("-p", S3_PORT)
    server.suspend()
    yield
    server.resume()


def await_write(node: str, pattern: str) -> None:
    """Until a file of that name is in the cache of the node's rclone, which uploads it later."""
    cache = Path(f"/proc/{slurmd(node).pid}/root/srv/local")
    deadline = time.monotonic() + SECONDS
    while not list(cache.glob(f"*/.cache/rclone/*/vfs/**/{pattern}")):
        assert time.monotonic() < deadline, f"no {pattern} in {cache}"
        time.sleep(0.02)


def assert_manifests_hold(run_name: str) -> None:
    """What a manifest in the bucket lists is in the bucket, in its full size."""
    s3 = boto3.client("s3")
    sizes = {
        item["Key"]: item["Size"]
        for page in s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=run_name)
        for item in page["Contents"]
    }
    manifests = [key for key in sizes if key.endswith(LAST_FILE)]
    assert manifests
    for key in manifests:
        files = json.load(s3.get_object(Bucket=BUCKET, Key=key)["Body"])["files"]
        folder = key.removesuffix(LAST_FILE)
        assert {name: sizes.get(folder + name) for name in files} == {
            name: entry["size"] for name, entry in files.items()
        }


def last_node() -> str:
    """Of those that are in use."""
    nodes = run("squeue", "--noheader", "--format=%N").strip()
    return run("scontrol", "show", "hostnames", nodes).split()[-1]


def finished_job(run_name: str, *, recoveries: int) -> str:
    """The log of the newest job, when it has ended and SkyPilot taken its last cluster down."""
    wait_until(lambda: newest_job()["end_at"] is not None)
    job = newest_job()
    assert (job["status"], job["recovery_count"]) == ("SUCCEEDED", recoveries)
    wait_until(lambda: run("squeue", "--noheader") == "")
    test_launch.assert_nothing_is_left()
    assert "final/summary.json" in stored(f"{run_name}/")
    log = run("sky", "jobs", "logs", str(job["job_id"]), "--no-follow")
    assert f"resuming from /checkpoints/{run_name}/checkpoint-" in log
    return log


def assert_as_undisturbed(name: str, model: Path, run_name: str) -> None:
    """Every loss, bit for bit, is that of a plain launch of the recipe."""
    if "final/summary.json" not in stored(f"{name}/"):
        with test_launch.torn_down(name):
            launch(name, model)
    assert history(run_name) == history(name)


def test_a_job_that_is_cancelled_and_then_warned_recovers_by_itself(model: Path) -> None:
    """First the allocation goes while checkpoint 6 waits for its upload; later SIGTERM comes.

    With the allocation go its processes, mounts and disks.
    """
    name = "gpt-oss-20b-lora"
    run_name = f"{name}-managed"
    options = [*scaled_down(name, model), "--env", f"RUN_NAME={run_name}"]
    options += ["--env", "WANDB_MODE=offline", "--secret", "WANDB_API_KEY"]
    run("sky", "jobs", "launch", "-y", "-d", f"{name}.yaml", *options)
    wait_until(lambda: run("squeue", "--noheader", "--states=running") != "")
    await_write(last_node(), "checkpoint-6/*")
    with bucket_stands_still():
        run("scancel", "--user", "root")
    assert_manifests_hold(run_name)
    assert f"checkpoint-6/{LAST_FILE}" not in stored(f"{run_name}/")

    await_checkpoint(run_name, 6)
    for process in processes_of(last_node()):
        with suppress(psutil.NoSuchProcess):
            if "SKYPILOT_NODE_RANK" in process.environ():
                process.send_signal(signal.SIGTERM)

    log = finished_job(run_name, recoveries=2)
    assert "wandb: Tracking run" in log
    logs = [path.read_text() for path in Path.home().rglob("*.log") if path.is_file()]
    assert all(KEY not in log for log in [log, *logs])
    assert_as_undisturbed(name, model, run_name)


def test_a_job_that_loses_one_of_two_nodes_recovers_by_itself(model: Path) -> None:
    """Every process of the second machine is killed, and it stays away."""
    name = "gpt-oss-120b-sft"
    run_name = f"{name}-managed"
    options = [*scaled_down(name, model), "--env", f"RUN_NAME={run_name}"]
    run("sky", "jobs", "launch", "-y", "-d", f"{name}.yaml", *options)
    await_checkpoint(run_name, 3)
    dead = last_node()
    for process in processes_of(dead):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert_manifests_hold(run_name)

    finished_job(run_name, recoveries=1)
    assert run("sinfo", "--noheader", "--states=down", "--format=%n").split() == [dead]
    assert_as_undisturbed(name, model, run_name)
