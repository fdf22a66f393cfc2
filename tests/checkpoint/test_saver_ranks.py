"""Two real processes: what happens on one rank decides for both."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.checkpoint.manifest import check_complete
from helpers.paths import CPU_ENVS, REPO


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both ranks of helpers/failing_saves.py have gone through all scenarios."""
    folder = tmp_path_factory.mktemp("ranks")
    program = [str(REPO / "tests/helpers/failing_saves.py"), str(folder)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    result = subprocess.run(
        [*launcher, *program],
        env=os.environ | CPU_ENVS,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return folder


def on_both(folder: Path, scenario: str) -> Any:
    """What happened, after a check that it was the same on both ranks."""
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    assert first[scenario] == second[scenario]
    return first[scenario]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("a_write_fails_on_rank_1", "failed on rank 1: OSError: the disk refuses"),
        ("an_upload_fails_on_rank_1", "failed on rank 1: OSError: the bucket refuses"),
        ("the_commit_fails_on_rank_0", "failed on rank 0: OSError: the bucket refuses"),
        ("the_bucket_is_gone_on_rank_1", "is no longer mounted: is the bucket gone?"),
    ],
)
def test_a_failure_on_one_rank_stops_all(scenario: str, message: str, folder: Path) -> None:
    assert message in on_both(folder, scenario)
    # keep=1, and yet the checkpoint before the failed one is there.
    assert check_complete(folder / scenario / "checkpoint-1") is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "scenario",
    [
        "a_newer_launch_is_seen_by_rank_0_between_two_saves",
        "a_newer_launch_comes_before_a_save",
        "a_newer_launch_comes_before_the_commit",
    ],
)
def test_a_newer_launch_stops_all(scenario: str, folder: Path) -> None:
    assert on_both(folder, scenario).startswith("fenced off: a newer launch continues this run")
    assert check_complete(folder / scenario / "checkpoint-1") is None
    assert check_complete(folder / scenario / "checkpoint-2") is not None


@pytest.mark.slow
def test_a_notice_on_one_rank_stops_all(folder: Path) -> None:
    assert on_both(folder, "the_notice_reaches_rank_1") == [True, True]


@pytest.mark.slow
def test_a_notice_on_one_rank_ends_an_evaluation_on_all_after_the_same_batch(folder: Path) -> None:
    assert on_both(folder, "the_notice_reaches_rank_1_in_an_evaluation") == 3


@pytest.mark.slow
def test_the_clock_of_rank_0_decides_when_all_save(folder: Path) -> None:
    assert on_both(folder, "it_is_time_on_the_clock_of_rank_0") == [True, False]
    assert on_both(folder, "it_is_time_on_the_clock_of_rank_1") == [False, False]
