"""Each task file, unmodified, rehearsed to its end by the command of the README."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import REPO, TASK_FILES
from rehearse import map_mounts


@pytest.mark.parametrize("task_file", TASK_FILES, ids=lambda path: path.stem)
def test_task_file_runs_to_its_end(task_file: Path) -> None:
    result = subprocess.run(
        [sys.executable, "tests/rehearsal/rehearse.py", task_file.name],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "processes: 2" in result.stdout
    assert "killed, as a preempted node is" in result.stdout
    assert "resuming from" in result.stdout


def test_bad_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text("{broken\n")
    result = subprocess.run(
        [
            sys.executable,
            "tests/rehearsal/rehearse.py",
            "gpt-oss-20b-lora.yaml",
            f"--dataset={tmp_path / 'my.jsonl'}",
        ],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "my.jsonl:1: not JSON" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_a_misspelt_flag_is_named() -> None:
    result = subprocess.run(
        [sys.executable, "tests/rehearsal/rehearse.py", "gpt-oss-20b-lora.yaml"],
        cwd=REPO,
        env=os.environ | {"TRAIN_ARGS": "--lerning_rate 1e-4"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "--lerning_rate" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_only_whole_mount_points_are_mapped() -> None:
    text = "python /sft/train.py --config /sft/a.yaml x/sft/y /sft2 '/sft'"
    assert (
        map_mounts(text, {"/sft": Path("/repo/sft")})
        == "python /repo/sft/train.py --config /repo/sft/a.yaml x/sft/y /sft2 '/repo/sft'"
    )
