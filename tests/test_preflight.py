"""What a user gets wrong is one line, before the ranks start."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.errors import one_line_errors
from helpers.launching import defaults
from helpers.paths import CPU_ENVS, REPO
from preflight import main

Preflight = Callable[..., str]


@pytest.fixture
def preflight(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Preflight:
    """Run preflight.py's main with flags over defaults that pass; what it said on stderr."""

    def run(*flags: str, **envs: str) -> str:
        for name, value in (CPU_ENVS | envs).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["preflight.py", *defaults(tiny_model, tmp_path), *flags])
        with pytest.raises(SystemExit) as stopped, one_line_errors():
            main()
        assert stopped.value.code == 1
        said = capsys.readouterr().err
        assert said.count("error:") == 1
        return said[said.index("error:") :]

    return run


@pytest.mark.parametrize(("flag", "status"), [("--max_length=256", 0), ("--max_length=8", 1)])
def test_the_script_itself(tiny_model: Path, tmp_path: Path, flag: str, status: int) -> None:
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
def test_wrong_flags(preflight: Preflight, flags: list[str], message: str) -> None:
    assert message in preflight(*flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n{oops\n', "data.jsonl:1: no assistant"),
        ('{"question": "x", "answer": "y"}\n', "columns question, answer"),
    ],
)
def test_wrong_data(preflight: Preflight, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    assert message in preflight(f"--dataset_name={tmp_path / 'data.jsonl'}")


def test_not_gpt_oss(preflight: Preflight, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    assert "not gpt_oss" in preflight(f"--model_name_or_path={tmp_path}")


def test_no_weights(preflight: Preflight, tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(
        tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*")
    )
    assert "no safetensors in" in preflight(f"--model_name_or_path={folder}")


def test_no_tokenizer(preflight: Preflight, tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tiny_model / "config.json", folder)
    assert "holds no tokenizer.json" in preflight(f"--model_name_or_path={folder}")


@pytest.mark.parametrize("key", ["secret", "s3cr3t!" * 6, "secret" * 7 + "\n"])
def test_a_malformed_wandb_key(preflight: Preflight, key: str) -> None:
    line = preflight(WANDB_API_KEY=key)
    assert "WANDB_API_KEY is not a key" in line and key.strip() not in line


def test_bucket_not_mounted(preflight: Preflight) -> None:
    line = preflight("--output_dir=/checkpoints/run", CHECKPOINT_BUCKET="mine")
    assert "nothing is mounted at /checkpoints" in line


def test_no_gpu(preflight: Preflight) -> None:
    line = preflight(ACCELERATE_USE_CPU="false", SKYPILOT_NUM_GPUS_PER_NODE="80")
    assert "GPUs are usable, 80 wanted" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk(preflight: Preflight, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        assert "less than 1 GiB is free" in preflight(f"--output_dir={disk}/run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
