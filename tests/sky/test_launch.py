"""The four task files, unmodified, through `sky launch` onto a real Slurm cluster (lab.sh).

The GPUs of a node are faked: options on the command line scale down what the files ask for, and a
tiny gpt-oss trains on the CPU. Provisioning, file mounts, the bucket, setup, ranks, logs, status
and teardown are SkyPilot's own.

A launch costs minutes, so each file is tried together with something that can go wrong on the way.
"""

import re
from pathlib import Path

import pytest

from lab import (
    CONVERSATIONS,
    NUM_RANKS,
    REPO,
    STEPS,
    assert_nothing_is_left,
    job_log,
    job_status,
    last_node,
    launch,
    loss_history,
    object_sizes,
    only_in_the_lab,
    processes_running,
    run,
    slurmd,
    step_of,
    suspended_during_upload,
    torn_down,
    wait_until,
)

pytestmark = only_in_the_lab


def assert_result_is_in_the_bucket(run_name: str, *, weights: str) -> None:
    """The files of the result, and of the last checkpoint those of every rank."""
    keys = set(object_sizes(f"{run_name}/"))
    assert {f"final/{weights}", "final/tokenizer.json", "final/summary.json"} <= keys
    folders = {key.split("/")[0] for key in keys if key.startswith("checkpoint-")}
    (last,) = (folder for folder in folders if step_of(folder) == STEPS)
    assert {f"{last}/rng_state_{rank}.pth" for rank in range(NUM_RANKS)} <= keys
    assert {f"{last}/__{rank}_0.distcp" for rank in range(NUM_RANKS)} <= keys
    assert f"{last}/manifest.json" in keys
    assert loss_history(run_name)[-1][1] < loss_history(run_name)[0][1]


def test_lora_on_20b_trains_and_leaves_its_checkpoints_in_the_bucket(model: Path) -> None:
    name = "gpt-oss-20b-lora"
    with torn_down(name):
        launch(name, model)
        assert job_status(name) == "SUCCEEDED"
        log = run("sky", "logs", name, "1", "--no-follow")
    assert log.count(" left · loss ") == STEPS
    assert f"processes: {NUM_RANKS}" in log
    # SkyPilot's own wait for uploads, at the end of the block, was reached.
    assert "skypilot: cached mount upload complete" in log
    assert_result_is_in_the_bucket(name, weights="adapter_model.safetensors")


def test_all_of_120b_trains_on_two_nodes_and_not_where_one_lacks_the_data(model: Path) -> None:
    """The second node ends with the reason, and the first, which waits for it, with the same."""
    name, here = "gpt-oss-120b-sft", "/srv/only-on-the-first-node.jsonl"
    Path(f"/proc/{slurmd('n2').pid}/root{here}").write_bytes(CONVERSATIONS.read_bytes())
    with torn_down(name):
        refused = launch(name, model, "--env", f"DATASET={here}", status=100)
        assert job_status(name) == "FAILED"
        assert f"dataset {here!r}" in refused and "node 1 (" in refused
        assert "left · loss" not in refused and "Traceback" not in refused

        log = launch(name, model)
        assert job_status(name) == "SUCCEEDED"
    # The second time, setup has found everything in its place.
    assert re.search(r"Checked \d+ packages", log) and "Installed" not in log
    assert log.count(" left · loss ") == STEPS
    assert f"processes: {NUM_RANKS}" in log
    assert_result_is_in_the_bucket(name, weights="model.safetensors")


@pytest.mark.long
def test_all_of_20b_gives_a_dead_bucket_up_and_its_machine_goes_when_a_slow_one_has_all(
    model: Path,
) -> None:
    name = "gpt-oss-20b-sft"
    launch(name, model, "-d", "--env", "UPLOAD_MINUTES=0.5")
    with suspended_during_upload(last_node(), wait=wait_until):
        for rank in processes_running("/sft/train.py"):
            rank.kill()
        wait_until(lambda: "error: the bucket has taken none of" in job_log(name, 1))
    log = run("sky", "logs", name, "1", status=100)  # until the job has ended
    assert job_status(name) == "FAILED"
    assert "cached mount upload complete" not in log

    launch(name, model, "-d", "-i", "1", "--down")
    with suspended_during_upload(last_node(), wait=wait_until):
        wait_until(lambda: "are not uploaded after 1 min" in job_log(name, 2))
    assert_nothing_is_left()
    assert "Autodowned cluster" in run("sky", "status", "--refresh", "-o", "json")
    assert_result_is_in_the_bucket(name, weights="model.safetensors")


@pytest.mark.long
def test_lora_on_120b_trains_without_a_bucket_and_its_checkpoints_stay_on_the_node(
    model: Path, tmp_path: Path
) -> None:
    """As the file says: an empty CHECKPOINT_BUCKET, and the three /checkpoints lines deleted."""
    name = "gpt-oss-120b-lora"
    lines = (REPO / f"{name}.yaml").read_text().splitlines()
    first = lines.index("  /checkpoints:")
    task_file = tmp_path / "no-bucket.yaml"
    task_file.write_text("\n".join(lines[:first] + lines[first + 3 :]))
    no_bucket = ["--env", "CHECKPOINT_BUCKET="]
    with torn_down(name):
        log = launch(name, model, *no_bucket, task_file=task_file)
        assert job_status(name) == "SUCCEEDED"
        assert log.count(" left · loss ") == STEPS
        files = run("sky", "exec", name, f"ls /checkpoints/{name}/final")
        assert "adapter_model.safetensors" in files and "summary.json" in files
