"""The four task files, unmodified, through `sky launch` onto a real Slurm cluster (lab.sh).

The GPUs of a node are faked: options on the command line scale down what the files ask for, and a
tiny gpt-oss trains on the CPU. Provisioning, file mounts, the bucket, setup, ranks, logs, status
and teardown are SkyPilot's own.
"""

import re
from pathlib import Path

import pytest

from lab import (
    NUM_RANKS,
    REPO,
    SCALED_DOWN,
    STEPS,
    job_status,
    launch,
    loss_history,
    object_sizes,
    only_in_the_lab,
    run,
    torn_down,
)

pytestmark = only_in_the_lab


@pytest.mark.parametrize("name", SCALED_DOWN)
def test_a_recipe_trains_and_leaves_its_checkpoints_in_the_bucket(name: str, model: Path) -> None:
    with torn_down(name):
        launch(name, model)
        assert job_status(name) == "SUCCEEDED"
        log = run("sky", "logs", name, "1", "--no-follow")
    assert log.count(" left · loss ") == STEPS
    assert loss_history(name)[-1][1] < loss_history(name)[0][1]
    assert f"processes: {NUM_RANKS}" in log

    keys = set(object_sizes(f"{name}/"))
    weights = "adapter_model.safetensors" if name.endswith("lora") else "model.safetensors"
    assert {f"final/{weights}", "final/tokenizer.json", "final/summary.json"} <= keys
    assert {f"checkpoint-{STEPS}/rng_state_{rank}.pth" for rank in range(NUM_RANKS)} <= keys
    assert {f"checkpoint-{STEPS}/__{rank}_0.distcp" for rank in range(NUM_RANKS)} <= keys
    assert f"checkpoint-{STEPS}/manifest.json" in keys


def test_checkpoints_stay_on_the_node_without_a_bucket_and_a_failed_training_is_a_failed_job(
    model: Path, tmp_path: Path
) -> None:
    """As the file says: an empty CHECKPOINT_BUCKET, and the three /checkpoints lines deleted."""
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
