"""What interruptions cost: each launch of a run keeps a small file beside its checkpoints."""

import json
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from finetune.checkpoint.fingerprint import read_record
from finetune.checkpoint.manifest import check_complete, checkpoints
from finetune.checkpoint.saver import Saver

FOLDER = "launches"


def read_launches(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of the launches so far, the oldest first; one torn by a kill is left out."""
    records = []
    for file in sorted((Path(run_dir) / FOLDER).glob("*.json")):
        try:
            records.append(json.loads(file.read_text()))
        except ValueError:
            continue
    return records


def conversation_date(run_dir: str | Path) -> str:
    """The date that the run's conversations are rendered with, as YYYY-MM-DD: that of its newest
    whole checkpoint, else the day of its first launch (UTC), today's if this is the first.
    """
    whole = (folder for folder in checkpoints(run_dir) if check_complete(folder) is None)
    newest = next(whole, None)
    if newest is not None:
        return read_record(newest).data.conversation_start_date
    started = [launch["started"] for launch in read_launches(run_dir)]
    return datetime.fromtimestamp(started[0] if started else time.time(), UTC).date().isoformat()


def first_wandb_run(run_dir: str | Path) -> str | None:
    """The id of the W&B run that the run's first launch with a key began."""
    return next(filter(None, (launch["wandb_run_id"] for launch in read_launches(run_dir))), None)


class LaunchLog(TrainerCallback):
    """Keeps this launch's record, at most a second old; only the first process writes.

    seconds: of training; updated and started: the wall clock's, to see how long nothing ran.
    """

    def __init__(self, run_dir: str | Path, saver: Saver, *, wandb_run_id: str | None) -> None:
        self.saver = saver
        folder = Path(run_dir) / FOLDER
        self.file = folder / f"{len(list(folder.glob('*.json'))) + 1:04}.json"
        self.record: dict[str, Any] = {"wandb_run_id": wandb_run_id}
        self.started = self.written = time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()
        self.record |= {"from_step": state.global_step, "started": time.time()}
        if state.is_world_process_zero and state.global_step < state.max_steps:
            self.file.parent.mkdir(exist_ok=True)
            self.write(state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and time.monotonic() - self.written >= 1:
            self.write(state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.write(state)

    def write(self, state: TrainerState) -> None:
        self.written = time.monotonic()
        self.record |= {
            "step": state.global_step,
            "seconds": round(self.written - self.started, 3),
            "saving_seconds": round(self.saver.stall_seconds, 3),
            "updated": time.time(),
        }
        with suppress(OSError):  # a bucket that is gone is reported by the next save
            self.file.write_text(json.dumps(self.record))


def interruption_cost(launches: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all launches but the last, how often and at what price they ended before the run did.

    minutes_lost: steps repeated, at the rate they had, and the time between two launches' training
    (none where the clock says that the later one came first). saving_percent: of the time trained.
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
