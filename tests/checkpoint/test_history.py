"""What interruptions cost."""

from pathlib import Path

import pytest

from finetune.checkpoint.history import interruption_cost, read_launches


def launch(from_step: int, step: int, *, started: float, seconds: float) -> dict[str, float]:
    return {
        "from_step": from_step,
        "step": step,
        "started": started,
        "updated": started + seconds,
        "seconds": seconds,
        "saving_seconds": seconds / 50,
    }


def test_repeated_steps_and_time_without_training_are_lost() -> None:
    first = launch(0, 100, started=1000, seconds=1000)
    second = launch(90, 200, started=2060, seconds=1100)  # 10 steps of 10 s, and a minute
    assert interruption_cost([first, second]) == {
        "interruptions": 1,
        "steps_repeated": 10,
        "minutes_lost": pytest.approx(160 / 60, abs=0.01),
        "saving_percent": 2.0,
    }


def test_a_clock_that_goes_backwards_gives_no_time_back() -> None:
    first = launch(0, 100, started=5000, seconds=1000)
    second = launch(100, 200, started=10, seconds=1000)
    assert interruption_cost([first, second])["minutes_lost"] == 0
    assert interruption_cost([first])["interruptions"] == 0


def test_a_torn_record_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "launches").mkdir()
    (tmp_path / "launches/0001.json").write_text('{"step": 1}')
    (tmp_path / "launches/0002.json").write_text('{"ste')
    assert read_launches(tmp_path) == [{"step": 1}]
    assert read_launches(tmp_path / "nowhere") == []
