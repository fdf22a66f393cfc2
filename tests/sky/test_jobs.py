"""Task files through `sky jobs launch`, in the lab of test_launch.py: SkyPilot recovers them.

The job's allocation is cancelled behind SkyPilot's back, and with it go the nodes' processes,
mounts and disks, as with spot instances that are taken away. Nobody launches again.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest
import test_launch
from test_launch import BUCKET, run, scaled_down, stored

LAST_FILE = "manifest.json"  # of a checkpoint: with it the checkpoint is whole
SECONDS = 600  # a recovery and the rest of the training take about 120

pytestmark = test_launch.pytestmark
model = test_launch.model
bucket = test_launch.bucket


def newest_job() -> dict[str, Any]:
    """As `sky jobs queue` has it."""
    jobs = json.loads(run("sky", "jobs", "queue", "-o", "json"))
    return max(jobs, key=lambda job: job["job_id"])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"still waiting after {SECONDS} seconds"
        time.sleep(5)


@pytest.mark.parametrize("name", ["gpt-oss-20b-lora", "gpt-oss-120b-sft"])
def test_managed_job_recovers_by_itself(name: str, model: Path) -> None:
    run_name = f"{name}-managed"
    options = [*scaled_down(name, model, steps=24), "--env", f"RUN_NAME={run_name}"]
    run("sky", "jobs", "launch", "-y", "-d", f"{name}.yaml", *options)
    boto3.client("s3").get_waiter("object_exists").wait(
        Bucket=BUCKET,
        Key=f"{run_name}/checkpoint-3/{LAST_FILE}",
        WaiterConfig={"Delay": 1, "MaxAttempts": 180},
    )
    run("scancel", "--user", "root")

    wait_until(lambda: newest_job()["end_at"] is not None)
    job = newest_job()
    assert (job["status"], job["recovery_count"]) == ("SUCCEEDED", 1)
    # Only then does SkyPilot fetch the log and take the recovered cluster down.
    wait_until(lambda: run("squeue", "--noheader") == "")
    assert "fuse" not in run("srun", "--nodes=3", "findmnt", "-rno", "TARGET,FSTYPE")
    log = run("sky", "jobs", "logs", str(job["job_id"]), "--no-follow")
    assert f"resuming from /checkpoints/{run_name}/checkpoint-" in log
    assert "final/summary.json" in stored(f"{run_name}/")
