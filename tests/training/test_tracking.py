"""Which W&B run a launch continues."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune.training.tracking import configure_wandb
from helpers.launch_records import record_launch

VARIABLES = ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RESUME", "SKYPILOT_TASK_ID")


@pytest.fixture(autouse=True)
def no_variables() -> Iterator[None]:
    """None of the variables is set; what a test sets is removed after it."""
    before = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    yield
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ.update(before)


def test_the_run_of_the_first_launch_with_a_key_is_continued(tmp_path: Path) -> None:
    os.environ["SKYPILOT_TASK_ID"] = "sky-3"
    record_launch(tmp_path, 1, wandb_run_id=None)
    record_launch(tmp_path, 2, wandb_run_id="sky-2")
    assert configure_wandb(str(tmp_path), run_name="mine") == "sky-2"
    assert os.environ["WANDB_RUN_ID"] == "sky-2"
    assert os.environ["WANDB_NAME"] == "mine sky-2"
    assert os.environ["WANDB_RESUME"] == "allow"


def test_a_first_launch_takes_skypilots_task_id(tmp_path: Path) -> None:
    os.environ["SKYPILOT_TASK_ID"] = "sky-2026_cluster:1"
    assert configure_wandb(str(tmp_path), run_name="mine") == "sky-2026_cluster-1"


def test_outside_skypilot_wandb_makes_up_an_id(tmp_path: Path) -> None:
    assert configure_wandb(str(tmp_path), run_name="mine") is None
    assert "WANDB_RUN_ID" not in os.environ


def test_a_variable_that_the_user_has_set_stays(tmp_path: Path) -> None:
    os.environ |= {"SKYPILOT_TASK_ID": "sky-1", "WANDB_RUN_ID": "my-own"}
    assert configure_wandb(str(tmp_path), run_name="mine") == "my-own"
