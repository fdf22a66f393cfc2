"""The four task files, unmodified, as SkyPilot reads them."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import sky

REPO = Path(__file__).resolve().parents[2]
TASK_FILES = {path.stem: path for path in sorted(REPO.glob("*.yaml"))}
RESOURCES = {
    "gpt-oss-20b-sft": ({"H100": 8}, 1, None),
    "gpt-oss-120b-sft": ({"H200": 8}, 4, "best"),
    "gpt-oss-20b-lora": ({"H100": 2}, 1, None),
    "gpt-oss-120b-lora": ({"H100": 8}, 1, None),
}


def load(name: str, **envs: str) -> sky.Task:
    overrides = list(({"CHECKPOINT_BUCKET": "my-bucket"} | envs).items())
    config = yaml.safe_load(TASK_FILES[name].read_text())
    return sky.Task.from_yaml_config(config, env_overrides=overrides)


def test_there_are_four() -> None:
    assert set(TASK_FILES) == set(RESOURCES)


@pytest.mark.parametrize("name", RESOURCES)
def test_what_a_task_asks_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    accelerators, num_nodes, network_tier = RESOURCES[name]
    task = load(name)
    (resources,) = task.resources
    assert task.name == task.envs["RUN_NAME"] == name
    assert resources.accelerators == accelerators
    assert task.num_nodes == num_nodes
    tier = resources.network_tier
    assert (tier.value if tier else None) == network_tier
    assert task.file_mounts == {"/sft": "./sft"}
    (bucket,) = task.storage_mounts.values()
    assert bucket.source == "s3://my-bucket" and bucket.mode.value == "MOUNT_CACHED"
    assert (REPO / task.envs["ACCELERATE_CONFIG"].lstrip("/")).is_file()
    assert set(task.secrets) == {"WANDB_API_KEY", "HF_TOKEN"}
    assert not {"WANDB_API_KEY", "HF_TOKEN"} & set(task.envs)


@pytest.mark.parametrize("name", RESOURCES)
def test_a_bucket_is_asked_for(name: str) -> None:
    config = yaml.safe_load(TASK_FILES[name].read_text())
    with pytest.raises(ValueError, match="CHECKPOINT_BUCKET"):
        sky.Task.from_yaml_config(config)


@pytest.mark.parametrize("name", RESOURCES)
def test_without_a_bucket_the_three_lines_go(name: str) -> None:
    lines = TASK_FILES[name].read_text().splitlines()
    first = lines.index("  /checkpoints:")
    config = yaml.safe_load("\n".join(lines[:first] + lines[first + 3 :]))
    task = sky.Task.from_yaml_config(config, env_overrides=[("CHECKPOINT_BUCKET", "")])
    assert task.storage_mounts == {} and task.file_mounts == {"/sft": "./sft"}


@pytest.mark.parametrize("block", ["setup", "run"])
@pytest.mark.parametrize("name", RESOURCES)
def test_bash(name: str, block: str, tmp_path: Path) -> None:
    script = tmp_path / f"{block}.sh"
    script.write_text(f"#!/bin/bash\n{getattr(load(name), block)}")
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    # SC1090, SC1091: the environment it activates is made on the node.
    checked = subprocess.run(
        [shellcheck, "-e", "SC1090,SC1091", script], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


def test_the_files_read_alike() -> None:
    """Everything but the flags is the same line for line: setup, launch, names of envs."""
    tasks = [yaml.safe_load(path.read_text()) for path in TASK_FILES.values()]
    for part in ("setup", "file_mounts", "secrets"):
        assert all(task[part] == tasks[0][part] for task in tasks), part
    assert all(list(task["envs"]) == list(tasks[0]["envs"]) for task in tasks)
    launches = {task["run"].split("preflight.py")[1] for task in tasks}
    assert len(launches) == 1
