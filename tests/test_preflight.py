"""preflight.py names in one line what a user got wrong, before the ranks start."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.errors import one_line_errors
from finetune.node import driver_problem
from helpers.launching import defaults
from helpers.paths import CPU_ENVS, REPO
from preflight import main
from rehearse import free_port

Preflight = Callable[..., str]
TWO_NODES = {"SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.2", "MASTER_PORT": str(free_port())}


@pytest.fixture
def preflight(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Preflight:
    """Run preflight.py's main in this process; return its error.

    flags and envs come after defaults that pass.
    """

    def run(*flags: str, **envs: str) -> str:
        for name, value in (CPU_ENVS | envs).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["preflight.py", *defaults(tiny_model, tmp_path), *flags])
        with pytest.raises(SystemExit) as stopped, one_line_errors():
            main()
        assert stopped.value.code == 1
        printed = capsys.readouterr().err
        assert printed.count("error:") == 1
        return printed[printed.index("error:") :]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "status"), [("--max_length=256", 0), ("--max_length=8", 1)])
def test_the_scripts_exit_status_is_that_of_its_checks(
    tiny_model: Path, tmp_path: Path, flag: str, status: int
) -> None:
    result = subprocess.run(
        [sys.executable, str(REPO / "sft/preflight.py"), *defaults(tiny_model, tmp_path), flag],
        env=os.environ | CPU_ENVS,
        capture_output=True,
        text=True,
    )
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    assert ("error: nothing is left to train on" in result.stderr) == bool(status)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lerning_rate=1"], "lerning_rate"),
        (["--lora_r=8"], "--lora_r is for LoRA"),
        (["--dataset_name=no/such-dataset"], "no/such-dataset"),
        (["--dataset_name=missing.jsonl"], "does not exist"),
        (["--eval_strategy=epoch"], "no split 'test'"),
        (["--model_name_or_path=no/such-model"], "no/such-model"),
        (["--output_dir=/proc/nowhere"], "cannot be written"),
    ],
)
def test_a_wrong_flag_is_named(preflight: Preflight, flags: list[str], message: str) -> None:
    assert message in preflight(*flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (
            '{"messages": [{"role": "user", "content": "x"}]}\n{oops\n',
            "data.jsonl:1: there is no assistant",
        ),
        ('{"question": "x", "answer": "y"}\n', "columns question, answer"),
    ],
)
def test_a_wrong_row_or_an_empty_file_is_named(
    preflight: Preflight, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    assert message in preflight(f"--dataset_name={tmp_path / 'data.jsonl'}")


def test_a_model_that_is_not_gpt_oss_is_refused(preflight: Preflight, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    assert "not gpt_oss" in preflight(f"--model_name_or_path={tmp_path}")


def test_a_model_without_weights_is_refused(
    preflight: Preflight, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(
        tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*")
    )
    assert "no safetensors in" in preflight(f"--model_name_or_path={folder}")


def test_a_model_without_a_tokenizer_is_refused(
    preflight: Preflight, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tiny_model / "config.json", folder)
    assert "holds no tokenizer.json" in preflight(f"--model_name_or_path={folder}")


@pytest.mark.parametrize("key", ["secret", "s3cr3t!" * 6, "secret" * 7 + "\n"])
def test_a_malformed_wandb_key_is_refused_and_not_printed(preflight: Preflight, key: str) -> None:
    line = preflight(WANDB_API_KEY=key)
    assert "WANDB_API_KEY is not a key" in line and key.strip() not in line


def test_a_bucket_that_is_not_mounted_is_named(preflight: Preflight) -> None:
    line = preflight("--output_dir=/checkpoints/run", CHECKPOINT_BUCKET="mine")
    assert "nothing is mounted at /checkpoints" in line


def test_a_node_with_too_few_gpus_is_refused(preflight: Preflight) -> None:
    line = preflight(ACCELERATE_USE_CPU="false", SKYPILOT_NUM_GPUS_PER_NODE="80")
    assert "GPUs are usable, 80 wanted" in line


@pytest.mark.parametrize(
    ("driver", "cuda", "message"),
    [
        ("570.133.20", "13.0", "driver is 570.133.20, and CUDA 13.0 needs 580 or newer"),
        ("580.95.05", "13.0", None),
        ("595.10", "13.0", None),
        ("570.133.20", "12.8", None),
        ("570.133.20", None, None),  # torch without CUDA
        (None, "13.0", None),  # no driver at all: then no GPU is usable, which has its own line
    ],
)
def test_a_driver_too_old_for_cuda_13_is_named(
    driver: str | None, cuda: str | None, message: str | None
) -> None:
    problem = driver_problem(driver, cuda=cuda)
    assert problem is None if message is None else message in str(problem)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_is_refused(preflight: Preflight, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        assert "less than 1 GiB is free" in preflight(f"--output_dir={disk}/run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_what_fails_on_one_node_ends_the_other_with_its_reason(
    tiny_model: Path, tmp_path: Path
) -> None:
    nodes = [
        subprocess.Popen(
            [sys.executable, str(REPO / "sft/preflight.py"), *defaults(tiny_model, tmp_path)],
            env=os.environ | CPU_ENVS | TWO_NODES | {"SKYPILOT_NODE_RANK": rank} | envs,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, envs in (("0", {}), ("1", {"WANDB_API_KEY": "no key"}))
    ]
    said = [node.communicate(timeout=600)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1]
    assert "error: node 1 (127.0.0.2): WANDB_API_KEY is not a key" in said[0], said
    assert "error: WANDB_API_KEY is not a key" in said[1], said
