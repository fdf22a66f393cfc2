"""Which ranks the watchdog blames; tests/runs/test_survival.py lets a real rank hang."""

from typing import Any

import pytest

from finetune.training.watchdog import Watchdog


def post(beat: int, moves: int, host: str) -> dict[str, Any]:
    return {"beat": beat, "moves": moves, "step": moves, "host": host}


def report(
    before: list[dict[str, Any]], after: list[dict[str, Any]], *, rank: int, capsys: Any
) -> str:
    """What this rank prints about the posts of all ranks at two times."""
    watchdog = Watchdog(timeout=8, is_excused=lambda: False)
    watchdog.rank, watchdog.world_size, watchdog.step = rank, len(before), 4
    watchdog.report(before, after)
    return capsys.readouterr().err


def test_a_rank_that_posts_no_more_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    before = [post(1, 5, "a"), post(1, 5, "b"), post(1, 5, "c")]
    after = [post(1, 5, "a"), post(2, 5, "b"), post(2, 5, "c")]
    line = (
        "error: no progress for 8 s in step 5: rank 0 (host a): process or node is not responding"
    )
    assert report(before, after, rank=1, capsys=capsys) == f"{line}\n"
    # One rank prints it: the first whose process runs.
    assert report(before, after, rank=2, capsys=capsys) == ""


def test_a_rank_that_never_posted_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    line = report([post(1, 5, "a"), {}], [post(2, 5, "a"), {}], rank=0, capsys=capsys)
    assert "rank 1 (host ?): process or node is not responding" in line


def test_a_rank_that_is_behind_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    before = [post(1, 5, "a"), post(1, 4, "b")]
    after = [post(2, 5, "a"), post(2, 4, "b")]
    line = report(before, after, rank=0, capsys=capsys)
    assert "rank 1 (host b): behind the other ranks, which wait for it" in line


def test_no_rank_is_named_if_all_wait_in_the_same_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = [post(1, 5, "a"), post(1, 5, "b")]
    after = [post(2, 5, "a"), post(2, 5, "b")]
    line = report(before, after, rank=0, capsys=capsys)
    assert "all ranks wait in the same place" in line and "rank 0" not in line
