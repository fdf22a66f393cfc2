"""Task files, unmodified, rehearsed to their end by the README's command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.cards import run_python_of_card
from helpers.paths import REPO
from own_data import flags_for
from rehearse import added_flags, given_flags, map_mounts


def rehearse(*arguments: str, **envs: str) -> subprocess.CompletedProcess[str]:
    """Run rehearse.py. TRAIN_ARGS is set only if envs gives it, whatever the environment has."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRAIN_ARGS"}
    return subprocess.run(
        [sys.executable, "tests/rehearsal/rehearse.py", *arguments],
        cwd=REPO,
        env=inherited | envs,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "name", ["gpt-oss-20b-lora", pytest.param("gpt-oss-120b-sft", marks=pytest.mark.long)]
)
def test_a_task_file_runs_to_its_end(name: str) -> None:
    """Data parallel LoRA, and all weights sharded over two nodes. tests/sky launches all four."""
    result = rehearse(f"{name}.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "processes: 2" in result.stdout
    assert "killed, as a preempted node is" in result.stdout
    assert "resuming from" in result.stdout
    work = REPO / ".rehearsal" / name
    (result_folder,) = work.glob("checkpoints/*/final")
    assert run_python_of_card(result_folder, base=work / "tiny-gpt-oss")


def test_flags_that_the_user_gives_win_over_those_of_the_rehearsal() -> None:
    result = rehearse(
        "gpt-oss-20b-lora.yaml", TRAIN_ARGS="--max_length 8 --learning-rate=1e-3 --save_steps 2"
    )
    added = "--use_cpu true --max_steps 12 --global_batch_size 4 --per_device_train_batch_size 1"
    assert f"rehearsal sets: {added}\n" in result.stdout
    # Every conversation is longer than eight tokens, so the user's max_length was used.
    assert result.returncode == 1
    assert "error: nothing is left to train on" in result.stdout


@pytest.mark.parametrize(
    ("train_args", "added"),
    [
        (
            "",
            "--use_cpu true --max_steps 12 --max_length 1024 --learning_rate 1e-2 --save_steps 4 "
            "--global_batch_size 4 --per_device_train_batch_size 1",
        ),
        (
            "--max_length 2048 --lora_r=4",
            "--use_cpu true --max_steps 12 --learning_rate 1e-2 --save_steps 4 "
            "--global_batch_size 4 --per_device_train_batch_size 1",
        ),
        (
            "--max-steps=20 --learning_rate 1e-4 --save_steps 5 --max_length 99 "
            "--global_batch_size=2",
            "--use_cpu true --per_device_train_batch_size 1",
        ),
    ],
)
def test_the_rehearsal_sets_what_the_user_does_not(
    train_args: str, added: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAIN_ARGS", train_args)
    assert added_flags(given_flags()) == added


@pytest.mark.parametrize(
    ("steps", "given", "flags"),
    [
        (1, set(), {"max_steps": "2", "save_steps": "1"}),
        (3, set(), {"save_steps": "1"}),
        (12, set(), {"save_steps": "4"}),
        (375, set(), {"max_steps": "12", "save_steps": "4"}),
        (375, {"max_steps", "save_steps"}, {}),
    ],
)
def test_with_the_users_data_the_steps_are_the_recipes_up_to_twelve(
    steps: int, given: set[str], flags: dict[str, str]
) -> None:
    """The lengths and the learning rate stay those of the recipe: no flag is set for them."""
    one_row = {"per_device_train_batch_size": "1"}
    assert flags_for(steps, given) == {"use_cpu": "true", **one_row, **flags}


def test_bad_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_text("{broken\n")
    result = rehearse("gpt-oss-20b-lora.yaml", f"--dataset={tmp_path / 'my.jsonl'}")
    assert result.returncode == 1
    assert "my.jsonl:1: not JSON" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.long
def test_a_misspelt_flag_is_named() -> None:
    result = rehearse("gpt-oss-20b-lora.yaml", TRAIN_ARGS="--lerning_rate 1e-4")
    assert result.returncode == 1
    assert "--lerning_rate" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_a_file_that_is_no_task_is_named(tmp_path: Path) -> None:
    task_file = tmp_path / "task.yaml"
    task_file.write_text("name: nothing\n")
    result = rehearse(str(task_file))
    assert result.returncode == 1
    assert f"error: {task_file} is no task file" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_only_complete_mount_points_are_mapped() -> None:
    text = "python /sft/train.py --config /sft/a.yaml x/sft/y /sft2 '/sft'"
    assert (
        map_mounts(text, {"/sft": Path("/repo/sft")})
        == "python /repo/sft/train.py --config /repo/sft/a.yaml x/sft/y /sft2 '/repo/sft'"
    )
