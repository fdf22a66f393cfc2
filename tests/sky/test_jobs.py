"""Task files through `sky jobs launch` in the lab of lab.sh: SkyPilot recovers the jobs.

Nobody launches a job again, and the losses are those of a run that nothing happened to.
"""

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import boto3
import psutil
import pytest

from helpers.metadata_server import AWS_NOTICE, MetadataServer, write_answer
from lab import (
    BUCKET,
    CONVERSATIONS,
    SECONDS_BETWEEN_JOB_CHECKS,
    WANDB_KEY,
    assert_nothing_is_left,
    last_node,
    launch,
    loss_history,
    newest_job,
    object_sizes,
    only_in_the_lab,
    run,
    scaled_down_options,
    slurmd,
    step_of,
    suspended_during_upload,
    torn_down,
    wait_for_job_to_reach,
    wait_until,
)

MANIFEST = "manifest.json"  # the last file of a checkpoint: with it the checkpoint is complete
SPOT_NODE = "n3"

pytestmark = only_in_the_lab


@pytest.fixture(autouse=True)
def state_of_the_lab() -> Iterator[None]:
    """Print what explains a job that did not recover; pytest shows it with a failure."""
    yield
    run("sinfo", "-R")
    run("squeue")
    for log in sorted((Path.home() / "sky_logs/jobs_controller").glob("[0-9]*.log")):
        print(log, *log.read_text().splitlines()[-60:], sep="\n")


def await_checkpoint(run_name: str, *, from_step: int = 1) -> None:
    """Until the bucket holds a complete checkpoint of this step or of a later one."""

    def steps() -> list[int]:
        return [
            step_of(key.split("/")[0])
            for key in object_sizes(f"{run_name}/")
            if key.endswith(f"/{MANIFEST}")
        ]

    wait_for_job_to_reach(lambda: max(steps(), default=0) >= from_step)


def processes_of(node: str) -> list[psutil.Process]:
    """The processes that see the same files as the machine's slurmd."""
    files = os.readlink(f"/proc/{slurmd(node).pid}/ns/mnt")
    found = []
    for process in psutil.process_iter():
        with suppress(OSError):
            if os.readlink(f"/proc/{process.pid}/ns/mnt") == files:
                found.append(process)
    return found


def cancel_allocations() -> None:
    """`scancel` every job of Slurm's, and wait until their processes, mounts and disks are gone."""
    cancelled = set(run("squeue", "--noheader", "--format=%i").split())
    run("scancel", "--user", "root")
    # SkyPilot may have asked for the next allocation meanwhile, so the queue need not be empty.
    wait_until(
        lambda: not cancelled & set(run("squeue", "--noheader", "--format=%i").split()),
        interval=0.5,
    )


def assert_manifests_hold(run_name: str) -> None:
    """Every file that a manifest in the bucket lists is in the bucket, in its full size."""
    sizes = object_sizes(f"{run_name}/")
    manifests = [key for key in sizes if key.endswith(MANIFEST)]
    assert manifests
    for key in manifests:
        manifest = boto3.client("s3").get_object(Bucket=BUCKET, Key=f"{run_name}/{key}")
        files = json.load(manifest["Body"])["files"]
        folder = key.removesuffix(MANIFEST)
        assert {name: sizes.get(folder + name) for name in files} == {
            name: entry["size"] for name, entry in files.items()
        }


def finished_job(run_name: str, *, recoveries: int) -> str:
    """The log of the newest job, once it has ended and SkyPilot has taken its last cluster down."""
    wait_for_job_to_reach(lambda: "final/summary.json" in object_sizes(f"{run_name}/"))
    wait_until(lambda: newest_job()["end_at"] is not None, interval=SECONDS_BETWEEN_JOB_CHECKS)
    job = newest_job()
    assert (job["status"], job["recovery_count"]) == ("SUCCEEDED", recoveries)
    assert_nothing_is_left()
    log = run("sky", "jobs", "logs", str(job["job_id"]), "--no-follow")
    assert f"resuming from /checkpoints/{run_name}/checkpoint-" in log
    return log


def finish_plain_launch(name: str, model: Path) -> None:
    """Launch the recipe under its own name to its end, if no test has done so."""
    if "final/summary.json" not in object_sizes(f"{name}/"):
        with torn_down(name):
            launch(name, model)


def assert_losses_of_an_undisturbed_run(name: str, model: Path, run_name: str) -> None:
    """Every loss, bit for bit, is that of a plain launch of the recipe."""
    finish_plain_launch(name, model)
    assert loss_history(run_name) == loss_history(name)


@pytest.mark.long
def test_a_finished_run_is_evaluated_and_exported_from_the_bucket_alone(model: Path) -> None:
    """The machine it was trained on is gone."""
    run_name, cluster = "gpt-oss-20b-lora", "after"
    finish_plain_launch(run_name, model)
    options = ["--infra", "slurm/lab", "--cpus", "8", "--memory", "64"]
    for env in (f"CHECKPOINT_BUCKET=s3://{BUCKET}", f"RUN_NAME={run_name}", "OMP_NUM_THREADS=1"):
        options += ["--env", env]
    evaluation = ["--gpus", "H100:1", "--env", f"DATASET={CONVERSATIONS}"]
    evaluation += ["--env", "EVALUATE_ARGS=--num_generations 1 --max_new_tokens 8"]
    export = ["--env", "FORMAT=mxfp4"]
    with torn_down(cluster):
        run("sky", "launch", "-y", "-c", cluster, "sft/evaluate.yaml", *options, *evaluation)
        run("sky", "launch", "-y", "-c", cluster, "sft/export.yaml", *options, *export)
    files = set(object_sizes(f"{run_name}/"))
    index = "mxfp4/model.safetensors.index.json"
    assert {"final/evaluation.json", "mxfp4/export.json", index} <= files


def test_a_job_recovers_from_a_cancelled_allocation_and_then_from_sigterm(model: Path) -> None:
    """First the allocation goes while a checkpoint waits for its upload; later SIGTERM comes."""
    name = "gpt-oss-20b-lora"
    run_name = f"{name}-managed"
    options = [*scaled_down_options(name, model), "--env", f"RUN_NAME={run_name}"]
    options += ["--env", "WANDB_MODE=offline", "--secret", "WANDB_API_KEY"]
    run("sky", "jobs", "launch", "-y", "-d", f"{name}.yaml", *options)
    await_checkpoint(run_name)
    with suspended_during_upload(last_node(), wait=wait_for_job_to_reach) as step:
        cancel_allocations()
    assert_manifests_hold(run_name)
    assert f"checkpoint-{step}/{MANIFEST}" not in object_sizes(f"{run_name}/")

    await_checkpoint(run_name, from_step=step)
    for process in processes_of(last_node()):
        with suppress(psutil.NoSuchProcess):
            if "SKYPILOT_NODE_RANK" in process.environ():
                process.send_signal(signal.SIGTERM)

    log = finished_job(run_name, recoveries=2)
    assert "wandb: Tracking run" in log
    logs = [path.read_text() for path in Path.home().rglob("*.log") if path.is_file()]
    assert all(WANDB_KEY not in log for log in [log, *logs])
    assert_losses_of_an_undisturbed_run(name, model, run_name)


@pytest.fixture
def spot_node(tmp_path: Path) -> Iterator[MetadataServer]:
    """The machine SPOT_NODE, which Slurm gives to a job of two nodes as the last one, as one of
    AWS's: its firmware says so, and a metadata service answers what is written to tmp_path.
    """
    firmware = "mount -t tmpfs tmpfs /sys/class && mkdir -p /sys/class/dmi/id && "
    firmware += "echo Amazon EC2 > /sys/class/dmi/id/sys_vendor"
    on_node = ["nsenter", f"--target={slurmd(SPOT_NODE).pid}", "--mount", "--root"]
    run(*on_node, "sh", "-c", firmware)
    with MetadataServer("AWS", tmp_path) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.long
def test_a_job_on_two_spot_nodes_saves_at_the_notice_for_one_and_recovers(
    model: Path, spot_node: MetadataServer
) -> None:
    """After the notice to the second machine, and when the step is saved, all its processes are
    killed, and it stays away. Without the notice there would be no checkpoint to go on from.
    """
    name = "gpt-oss-120b-sft"
    run_name = f"{name}-managed"
    options = [*scaled_down_options(name, model, save_steps=1000), "--env", f"RUN_NAME={run_name}"]
    options += ["--env", f"AWS_EC2_METADATA_SERVICE_ENDPOINT={spot_node.address}"]
    run("sky", "jobs", "launch", "-y", "-d", f"{name}.yaml", *options)
    wait_for_job_to_reach(lambda: "launches/0001.json" in object_sizes(f"{run_name}/"))
    assert last_node() == SPOT_NODE
    notice = json.dumps({"action": "terminate", "time": "2026-11-26T18:02:00Z"})
    write_answer(spot_node.folder, AWS_NOTICE, notice)
    await_checkpoint(run_name)
    for process in processes_of(SPOT_NODE):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert_manifests_hold(run_name)

    finished_job(run_name, recoveries=1)
    assert run("sinfo", "--noheader", "--states=down", "--format=%n").split() == [SPOT_NODE]
    assert_losses_of_an_undisturbed_run(name, model, run_name)
