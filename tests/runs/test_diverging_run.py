"""Runs whose numbers stop being finite: every rank ends before the step, and says where it was."""

import shutil
from pathlib import Path

import pytest

from finetune.checkpoint.manifest import check_complete
from helpers.launching import LORA, Launch
from helpers.memory_fault import GOOD_STEPS
from helpers.paths import REPO


def test_a_learning_rate_that_is_far_too_high_ends_a_sharded_run(
    launch: Launch, tmp_path: Path
) -> None:
    result = launch("fsdp2.yaml", "--learning_rate=1e30", "--save_steps=100")
    assert result.returncode not in (0, 143)
    assert result.stderr.count("error: training diverged at step ") == 1
    assert "lower --learning_rate" in result.stderr and "no checkpoint is complete" in result.stderr
    assert not (tmp_path / "run/final").exists()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_nan_on_one_rank_ends_all_and_the_save_under_way_is_completed(
    launch: Launch, tmp_path: Path
) -> None:
    """In data parallel, with LoRA. The checkpoint of the step before is the one that is kept."""
    script = REPO / "tests/helpers/memory_fault.py"
    result = launch(*LORA, "--save_steps=1", "--save_total_limit=1", script=script)
    assert result.returncode not in (0, 143)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"training diverged at step {GOOD_STEPS + 1}, not finite: " in line
    assert (
        "loss and gradient norm on rank 1" in line
        and "loss and gradient norm on rank 0" not in line
    )
    assert "not finite before this step: " in line and " on rank 1; nothing" in line
    kept = f"checkpoint-{GOOD_STEPS}"
    assert line.endswith(f"the last complete checkpoint is {kept}")
    assert check_complete(tmp_path / "run" / kept) is None
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {kept, "launches"}
    assert not (tmp_path / "run/final").exists()
    assert not (tmp_path / f"run/checkpoint-{GOOD_STEPS + 1}").exists()


@pytest.mark.long
@pytest.mark.skipif(
    shutil.which("c++") is None, reason="DeepSpeed builds its AdamW for the CPU with a C++ compiler"
)
def test_zero3_ends_before_the_backward_pass_that_would_change_the_weights(
    launch: Launch, tmp_path: Path
) -> None:
    result = launch("zero3_offload.yaml", "--learning_rate=1e30", "--save_steps=100")
    assert result.returncode not in (0, 143)
    assert (
        "training diverged at step 2, not finite: loss on rank 0, loss on rank 1" in result.stderr
    )
    assert result.stderr.count("error: ") == 1
    assert not (tmp_path / "run/final").exists()
    assert not list((tmp_path / "run").glob("checkpoint-*"))
