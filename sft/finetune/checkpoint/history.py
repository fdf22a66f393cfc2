"""The launches of a run, and what its interruptions cost.

Each launch keeps a small JSON file, launches/NNNN.json, beside the run's checkpoints.
"""

import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from finetune.checkpoint.fence import Fence
from finetune.checkpoint.fingerprint import read_record
from finetune.checkpoint.manifest import newest_checkpoint
from finetune.checkpoint.saver import Saver
from finetune.checkpoint.writers import LAUNCHES, launch_numbers, newest_writer

FOLDER = LAUNCHES
# What each record holds beside wandb_run_id and, since there was a first checkpoint, `complete`.
NUMBERS = ("from_step", "step", "seconds", "saving_seconds", "started", "updated")
WANDB_ID = re.compile(r"[\w-]{1,128}")  # what wandb takes; anything else is garbage
LARGEST = 1e11  # as a Unix time this is in the year 5138


def read_launches(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of the launches so far, the oldest first. What is not a whole record is left out:
    a kill may have cut one off.
    """
    files = sorted((Path(run_dir) / FOLDER).glob("*.json"))
    return [record for file in files if (record := read_launch(file)) is not None]


def read_launch(file: Path) -> dict[str, Any] | None:
    """The record of one launch, or None if the file holds none."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    numbers = [record.get(name) for name in NUMBERS] if isinstance(record, dict) else [None]
    is_record = all(isinstance(n, (int, float)) and 0 <= n < LARGEST for n in numbers)
    return record if is_record else None


def conversation_date(run_dir: str | Path) -> str:
    """The date that the run's conversations are rendered with, as YYYY-MM-DD.

    It is part of every conversation's tokens, and so all launches of a run must use the same: that
    of the newest complete checkpoint, or else of the newest launch that has claimed the run, or
    else the day (UTC) of the first launch, or else today.
    """
    newest = newest_checkpoint(run_dir)
    if newest is not None:
        return read_record(newest).data.conversation_start_date
    writer = newest_writer(Path(run_dir))
    date = writer.fingerprint.get("conversation_start_date") if writer else None
    if isinstance(date, str):
        return date
    started = [launch["started"] for launch in read_launches(run_dir)]
    return datetime.fromtimestamp(started[0] if started else time.time(), UTC).date().isoformat()


def first_wandb_run(run_dir: str | Path) -> str | None:
    """The id of the W&B run that this run's first launch with an API key started, or None."""
    ids = [launch.get("wandb_run_id") for launch in read_launches(run_dir)]
    return next((name for name in ids if isinstance(name, str) and WANDB_ID.fullmatch(name)), None)


class LaunchLog(TrainerCallback):
    """Writes this launch's record about once a second, and when training ends, on rank 0.

    from_step, step: where the launch began and how far it is. seconds, saving_seconds: of training
    and, within that, of waiting for saves. started, updated: Unix times, from which the time
    between two launches follows. complete: the step of the newest checkpoint that it completed, or
    None. gpus, price_per_hour: of all machines of the launch; dollars, 0 if not known.
    """

    def __init__(
        self,
        run_dir: str | Path,
        saver: Saver,
        *,
        wandb_run_id: str | None,
        price_per_hour: float = 0.0,
        fence: Fence | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.saver, self.fence, self.clock = saver, fence, clock
        self.run_dir = Path(run_dir)
        self.file = self.file_of_number(max(launch_numbers(run_dir), default=0) + 1)
        self.record: dict[str, Any] = {
            "wandb_run_id": wandb_run_id,
            "price_per_hour": price_per_hour,
        }
        self.started = self.written = clock()

    def file_of_number(self, number: int) -> Path:
        return self.run_dir / FOLDER / f"{number:04}.json"

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.started = self.clock()
        if self.fence is not None and self.fence.writer is not None:
            # A number that no other launch has: they might not see each other's records in time.
            self.file = self.file_of_number(self.fence.writer.number)
        self.record |= {
            "from_step": state.global_step,
            "started": time.time(),
            "gpus": args.world_size,
        }
        # A launch that finds the run finished trains nothing: it does not count as one.
        if state.is_world_process_zero and state.global_step < state.max_steps:
            self.file.parent.mkdir(exist_ok=True)
            self.write(state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.clock() - self.written >= 1:
            self.write(state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.write(state)

    def write(self, state: TrainerState) -> None:
        """Write the record as of now."""
        self.written = self.clock()
        self.record |= {
            "step": state.global_step,
            "seconds": round(self.written - self.started, 3),
            "saving_seconds": round(self.saver.stall_seconds, 3),
            "updated": time.time(),
            "complete": self.saver.complete_step,
        }
        with suppress(OSError):  # the next save reports a bucket that is gone, on all ranks
            self.file.write_text(json.dumps(self.record))


def interruption_cost(launches: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the run was interrupted, and the price. launches: all of them, the oldest first.

    minutes_lost: the time of the steps that were repeated, at the rate of the launch that lost
    them, and the time between two launches' training (none where the second machine's clock is
    behind the first's). saving_percent: the share of the training time spent waiting for saves.
    """
    repeated, seconds_lost = 0, 0.0
    for before, after in zip(launches, launches[1:], strict=False):
        steps = max(0, before["step"] - after["from_step"])
        trained = max(1, before["step"] - before["from_step"])
        repeated += steps
        seconds_lost += steps * before["seconds"] / trained
        seconds_lost += max(0.0, after["started"] - before["updated"])
    seconds = sum(launch["seconds"] for launch in launches)
    saving = sum(launch["saving_seconds"] for launch in launches)
    return {
        "interruptions": max(0, len(launches) - 1),
        "steps_repeated": repeated,
        "minutes_lost": round(seconds_lost / 60, 2),
        "saving_percent": round(100 * saving / seconds, 2) if seconds else 0.0,
    }


def run_cost(launches: list[dict[str, Any]]) -> dict[str, Any]:
    """What training has used and, where every launch knew its price, cost. launches: all of them.

    gpu_hours: of training, with its saves and evaluations. cost_while_training: dollars for them.
    The machines are also paid for while they are set up, load the model and stand idle: that is not
    in it. Empty if a launch was recorded by a version that did not write its GPUs down.
    """
    if not launches or not all(is_count(launch.get("gpus")) for launch in launches):
        return {}
    cost = {"gpu_hours": round(sum(n["gpus"] * n["seconds"] for n in launches) / 3600, 2)}
    prices = [launch.get("price_per_hour") for launch in launches]
    if all(isinstance(price, (int, float)) and price > 0 for price in prices):
        dollars = sum(n["price_per_hour"] * n["seconds"] for n in launches) / 3600
        cost["cost_while_training"] = f"${dollars:,.2f}"
    return cost


def is_count(value: Any) -> bool:
    """Whether it is a number of GPUs."""
    return isinstance(value, int) and value > 0
