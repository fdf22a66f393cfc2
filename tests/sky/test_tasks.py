"""The four task files, unmodified, as SkyPilot reads them."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sky

REPO = Path(__file__).resolve().parents[2]
TASK_FILES = {path.stem: path for path in sorted(REPO.glob("*.yaml"))}
SERVE = REPO / "sft/serve.yaml"
EVALUATE, EXPORT = REPO / "sft/evaluate.yaml", REPO / "sft/export.yaml"
RESOURCES = {  # GPUs in the order of choice, nodes, network tier
    "gpt-oss-20b-sft": (["H100:8", "H200:8"], 1, None),
    "gpt-oss-120b-sft": (["H200:8"], 4, "best"),
    "gpt-oss-20b-lora": (["H100:2", "H100:1", "H200:1", "H100:4", "H100:8"], 1, None),
    "gpt-oss-120b-lora": (["H100:8", "H200:8", "H100:4", "H200:1"], 1, None),
}


def load(name: str, **envs: str) -> sky.Task:
    overrides = list(({"CHECKPOINT_BUCKET": "s3://my-bucket"} | envs).items())
    config = yaml.safe_load(TASK_FILES[name].read_text())
    return sky.Task.from_yaml_config(config, env_overrides=overrides)


def test_there_are_four() -> None:
    assert set(TASK_FILES) == set(RESOURCES)


@pytest.mark.parametrize("name", RESOURCES)
def test_what_a_task_asks_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    accelerators, num_nodes, network_tier = RESOURCES[name]
    task = load(name)
    assert isinstance(task.resources, list)  # a set would be taken by price, not in order
    (resources, *_) = task.resources
    assert task.name == task.envs["RUN_NAME"] == name
    asked = [f"{gpu}:{n}" for each in task.resources for gpu, n in each.accelerators.items()]
    assert asked == accelerators
    # Each of them can share the global batch out among its GPUs.
    counts = [num_nodes * int(gpus.split(":")[1]) for gpus in accelerators]
    assert all(int(task.envs["GLOBAL_BATCH_SIZE"]) % count == 0 for count in counts)
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


@pytest.mark.parametrize("store", ["s3", "gs", "r2", "nebius"])
def test_a_bucket_is_named_by_its_url(store: str) -> None:
    task = load("gpt-oss-20b-lora", CHECKPOINT_BUCKET=f"{store}://my-bucket")
    (bucket,) = task.storage_mounts.values()
    assert bucket.source == f"{store}://my-bucket" and bucket.mode.value == "MOUNT_CACHED"


@pytest.mark.parametrize("name", RESOURCES)
def test_without_a_bucket_the_documented_command_leaves_its_mount_out(name: str) -> None:
    """SkyPilot 0.14.1 has no mount that vanishes with an empty env."""
    docs = (REPO / "docs/launch.md").read_text()
    (command,) = re.findall(r"^(sed .*) gpt-oss-20b-lora.yaml > /tmp/no-bucket.yaml$", docs, re.M)
    words = [*shlex.split(command), TASK_FILES[name]]
    config = yaml.safe_load(subprocess.run(words, check=True, capture_output=True).stdout)
    task = sky.Task.from_yaml_config(config, env_overrides=[("CHECKPOINT_BUCKET", "")])
    assert task.storage_mounts == {} and task.file_mounts == {"/sft": "./sft"}


@pytest.mark.parametrize("block", ["setup", "run"])
@pytest.mark.parametrize("name", RESOURCES)
def test_bash(name: str, block: str, tmp_path: Path) -> None:
    check_bash(getattr(load(name), block), tmp_path / f"{block}.sh")


@pytest.mark.parametrize("block", ["setup", "run"])
@pytest.mark.parametrize("file", [SERVE, EVALUATE, EXPORT], ids=lambda file: file.stem)
def test_bash_of_the_tasks_after_training(file: Path, block: str, tmp_path: Path) -> None:
    check_bash(yaml.safe_load(file.read_text())[block], tmp_path / f"{block}.sh")


def check_bash(block: str, script: Path) -> None:
    script.write_text(f"#!/bin/bash\n{block}")
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


def test_what_serving_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    config = yaml.safe_load(SERVE.read_text())
    with pytest.raises(ValueError, match="CHECKPOINT_BUCKET|API_KEY"):
        sky.Task.from_yaml_config(config)
    secrets = [("API_KEY", "secret")]
    task = sky.Task.from_yaml_config(
        config, env_overrides=[("CHECKPOINT_BUCKET", "s3://my-bucket")], secrets_overrides=secrets
    )
    (resources,) = task.resources
    assert task.name == SERVE.stem and resources.accelerators == {"H100": 1}
    assert not resources.ports  # vLLM's key guards /v1 only
    (bucket,) = task.storage_mounts.values()
    assert bucket.source == "s3://my-bucket" and bucket.mode.value == "MOUNT"
    assert set(task.secrets) == {"API_KEY", "HF_TOKEN"} and "API_KEY" not in task.envs
    assert re.search(r" vllm==\d+\.\d+\.\d+$", task.setup, re.M)


@pytest.mark.parametrize(
    ("file", "accelerators"),
    [(EVALUATE, [{"H100": 1}, {"H200": 1}]), (EXPORT, [None])],
    ids=["evaluate", "export"],
)
def test_evaluation_and_export_start_from_the_bucket_and_a_gpu_is_asked_for_where_one_is_needed(
    file: Path, accelerators: list[dict[str, int] | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    config = yaml.safe_load(file.read_text())
    with pytest.raises(ValueError, match="CHECKPOINT_BUCKET|FORMAT"):
        sky.Task.from_yaml_config(config)
    envs = [("CHECKPOINT_BUCKET", "s3://my-bucket"), ("FORMAT", "mxfp4")]
    task = sky.Task.from_yaml_config(config, env_overrides=envs)
    assert task.name == file.stem and task.file_mounts == {"/sft": "./sft"}
    assert [resources.accelerators for resources in task.resources] == accelerators
    assert all(resources.autostop_config.down for resources in task.resources)
    (bucket,) = task.storage_mounts.values()
    assert bucket.source == "s3://my-bucket" and bucket.mode.value == "MOUNT_CACHED"
    recipe = yaml.safe_load(TASK_FILES["gpt-oss-20b-lora"].read_text())
    assert recipe["setup"].startswith(task.setup)
    assert set(task.secrets) <= set(recipe["secrets"])


@pytest.mark.parametrize(
    ("files", "served_folder", "expected"),
    [
        ({"final/adapter_config.json": '{"r": 8}'}, "", "--max-lora-rank 8"),
        ({"final/adapter_config.json": '{"r": 24}'}, "", "--max-lora-rank 32"),
        ({"bf16/config.json": "{}"}, "bf16", "/my-run/bf16 --served-model-name my-run"),
        ({"final/config.json": "{}"}, "", "error: .* holds no adapter"),
        ({}, "", "error: .* holds neither"),
    ],
)
def test_what_is_served(
    files: dict[str, str], served_folder: str, expected: str, tmp_path: Path
) -> None:
    """The run block, with a vllm that only says what it was called with."""
    for name, text in files.items():
        file = tmp_path / "checkpoints/my-run" / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
    (tmp_path / "bin").mkdir()
    vllm = tmp_path / "bin/vllm"
    vllm.write_text('#!/bin/bash\necho "$VLLM_API_KEY: $*"\n')
    vllm.chmod(0o755)
    (tmp_path / "bin/activate").touch()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    config = yaml.safe_load(SERVE.read_text())
    script = config["run"].replace("/checkpoints", str(tmp_path / "checkpoints"))
    script = script.replace("~/vllm-env", str(tmp_path))
    given = {"RUN_NAME": "my-run", "SERVED_FOLDER": served_folder, "API_KEY": "secret"}
    given["SERVE_ARGS"] = "--host 0.0.0.0"
    envs = {**os.environ, **{k: v or "" for k, v in config["envs"].items()}, **given}
    envs["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    result = subprocess.run(["bash", "-c", script], env=envs, capture_output=True, text=True)
    said = result.stdout + result.stderr
    assert re.search(expected, said), said
    if "error" not in expected:
        # argparse takes the last of two equal flags: SERVE_ARGS cannot open the port.
        hosts = re.findall(r"--host (\S+)", said)
        assert hosts == ["0.0.0.0", "127.0.0.1"] and said.endswith("--port 8000\n")
    assert result.returncode == (1 if "error" in expected else 0)
    if "lora" in expected:
        base = "secret: serve openai/gpt-oss-20b --enable-lora --lora-modules my-run="
        assert said.startswith(base + f"{tmp_path}/checkpoints/my-run/final ")


def test_what_a_cloud_needs_is_pinned() -> None:
    """`make sky` and `make sky CLOUD=...` install these extras of SkyPilot, pinned by the locks."""
    groups = tomllib.loads((REPO / "pyproject.toml").read_text())["dependency-groups"]
    clouds, ours = groups["clouds"][0], groups["sky"][0]
    locks = [REPO / "tests/sky" / name for name in ("requirements.lock", "clouds.lock")]
    pins = re.findall(r"^([\w.-]+)==", "\n".join(lock.read_text() for lock in locks), re.M)
    pinned = {canonicalize_name(name) for name in pins}
    extras = Requirement(clouds).extras | Requirement(ours).extras
    assert {"azure", "gcp", "nebius", "runpod", "lambda", "kubernetes"} <= extras
    for needed in map(Requirement, metadata.requires("skypilot") or []):
        if needed.marker and any(needed.marker.evaluate({"extra": extra}) for extra in extras):
            assert canonicalize_name(needed.name) in pinned, needed
