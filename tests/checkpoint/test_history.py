"""Records of launches, and what interruptions cost."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import TrainerState

from finetune.checkpoint.history import (
    LaunchLog,
    conversation_date,
    first_wandb_run,
    interruption_cost,
    read_launches,
    run_cost,
)
from finetune.checkpoint.manifest import MANIFEST, write_manifest
from finetune.checkpoint.saver import Saver
from helpers.checkpoints import FINGERPRINT


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


def test_a_second_machine_whose_clock_is_behind_loses_no_time() -> None:
    first = launch(0, 100, started=5000, seconds=1000)
    second = launch(100, 200, started=10, seconds=1000)
    assert interruption_cost([first, second])["minutes_lost"] == 0
    assert interruption_cost([first])["interruptions"] == 0


def test_launches_on_other_machines_add_up_to_the_runs_cost() -> None:
    first = launch(0, 100, started=0, seconds=1800) | {"gpus": 8, "price_per_hour": 20.0}
    second = launch(90, 200, started=9000, seconds=3600) | {"gpus": 2, "price_per_hour": 6.5}
    assert run_cost([first, second]) == {"gpu_hours": 6.0, "cost_while_training": "$16.50"}


@pytest.mark.parametrize("price", (0, None, "6.5", -1))
def test_one_launch_without_a_price_leaves_the_cost_unknown(price: Any) -> None:
    priced = launch(0, 100, started=0, seconds=1800) | {"gpus": 8, "price_per_hour": 20.0}
    other = launch(90, 200, started=9000, seconds=3600) | {"gpus": 2, "price_per_hour": price}
    assert run_cost([priced, other]) == {"gpu_hours": 6.0}


def test_records_of_earlier_versions_count_no_gpu_hours() -> None:
    assert run_cost([launch(0, 100, started=0, seconds=1800)]) == {}
    assert run_cost([]) == {}


GARBAGE = ("", '{"ste', "{}", "[]", "null", "[" * 100_000, '{"from_step": "0"}', "\ud800")


@pytest.mark.parametrize("garbage", GARBAGE)
def test_what_is_no_record_is_skipped(tmp_path: Path, garbage: str) -> None:
    folder = tmp_path / "launches"
    folder.mkdir()
    record = launch(0, 1, started=0, seconds=1)
    (folder / "0001.json").write_bytes(garbage.encode(errors="surrogatepass"))
    (folder / "0002.json").write_text(json.dumps(record))
    (folder / "0003.json").mkdir()
    (folder / "0004.json").symlink_to("nowhere")
    (folder / "0005.json").write_text(json.dumps(record | {"started": 1e300}))
    assert read_launches(tmp_path) == [record]
    garbage_ids: tuple[Any, ...] = (7, {}, "a/b", "x" * 200)
    for wandb_run_id in garbage_ids:
        (folder / "0006.json").write_text(json.dumps(record | {"wandb_run_id": wandb_run_id}))
        assert first_wandb_run(tmp_path) is None
    (folder / "0006.json").unlink()
    assert first_wandb_run(tmp_path) is None
    assert conversation_date(tmp_path) == "1970-01-01"
    assert interruption_cost(read_launches(tmp_path))["interruptions"] == 0
    assert read_launches(tmp_path / "nowhere") == []


def test_a_launch_writes_over_no_other_record(tmp_path: Path) -> None:
    (tmp_path / "launches").mkdir()
    for name in ("0003.json", "notes.json"):
        (tmp_path / "launches" / name).write_text("{}")
    saver = cast(Saver, SimpleNamespace(stall_seconds=0.0))
    assert LaunchLog(tmp_path, saver, wandb_run_id=None).file.name == "0004.json"


FOUR_GPUS = SimpleNamespace(world_size=4)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_launch_is_recorded_at_most_once_a_second(tmp_path: Path) -> None:
    clock = Clock()
    saver = cast(Saver, SimpleNamespace(stall_seconds=0.25, complete_step=2))
    log = LaunchLog(tmp_path, saver, wandb_run_id="w", price_per_hour=12.5, clock=clock)
    state = TrainerState(global_step=3, max_steps=10)

    def recorded() -> dict[str, Any]:
        (record,) = read_launches(tmp_path)
        return record

    log.on_train_begin(FOUR_GPUS, state, None)
    assert recorded()["from_step"] == recorded()["step"] == 3
    assert recorded()["gpus"] == 4 and recorded()["price_per_hour"] == 12.5
    for clock.now, state.global_step in ((0.5, 4), (0.9, 5)):
        log.on_step_end(None, state, None)
        assert recorded()["step"] == 3
    clock.now, state.global_step = 1.5, 6
    log.on_step_end(None, state, None)
    assert recorded()["step"] == 6 and recorded()["seconds"] == 1.5
    clock.now, state.global_step = 1.6, 7
    log.on_train_end(None, state, None)
    assert recorded()["step"] == 7 and recorded()["saving_seconds"] == 0.25
    assert recorded()["complete"] == 2
    assert first_wandb_run(tmp_path) == "w"


def test_a_launch_that_has_nothing_to_train_is_not_recorded(tmp_path: Path) -> None:
    saver = cast(Saver, SimpleNamespace(stall_seconds=0.0))
    log = LaunchLog(tmp_path, saver, wandb_run_id=None)
    log.on_train_begin(FOUR_GPUS, TrainerState(global_step=4, max_steps=4), None)
    assert read_launches(tmp_path) == []


def test_all_launches_use_the_date_of_the_newest_checkpoint_or_the_first_launch(
    tmp_path: Path,
) -> None:
    (tmp_path / "launches").mkdir()
    for name, started in (("0001", 86400.0 * 365), ("0002", 86400.0 * 400)):
        record = json.dumps(launch(0, 1, started=started, seconds=1))
        (tmp_path / f"launches/{name}.json").write_text(record)
    assert conversation_date(tmp_path) == "1971-01-01"
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    write_manifest(folder, {"files": {}, "fingerprint": FINGERPRINT})
    assert conversation_date(tmp_path) == "2026-01-02"
    (folder / MANIFEST).unlink()
    assert conversation_date(tmp_path) == "1971-01-01"
