"""A Saver on every rank, of which one rank's part goes wrong; run by torchrun.

python -m torch.distributed.run --standalone --nproc-per-node 2 failing_saves.py FOLDER

Each rank writes FOLDER/RANK.json: what happened on it in each scenario.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerControl, TrainerState

from finetune.checkpoint.fence import Fence, FencedOff
from finetune.checkpoint.fingerprint import RunRecord
from finetune.checkpoint.manifest import MANIFEST
from finetune.checkpoint.saver import EvaluationAbandoned, Saver
from finetune.errors import UserError
from finetune.preemption import PreemptionNotice
from helpers.checkpoints import FINGERPRINT


class Rank:
    """This rank's saver, after one save that went well. Errors come where they are asked for."""

    def __init__(self, run_dir: Path) -> None:
        self.rank = PartialState().process_index
        self.now = 0.0
        self.fails_to_write = self.fails_to_upload = self.fails_to_commit = False
        self.notice = PreemptionNotice()
        run_dir.mkdir(exist_ok=True)
        self.record = RunRecord.from_json(FINGERPRINT, file=run_dir)
        self.saver = Saver(
            run_dir,
            notice=self.notice,
            every_minutes=1,
            keep=1,
            manifest={},
            fence=Fence(run_dir, self.record),
            await_upload=self.upload,
            clock=lambda: self.now,
        )
        self.saver.claim_run()
        self.saver.save(1, None, self.write)
        self.saver.finish()

    def be_replaced(self) -> None:
        """Let another launch claim the run."""
        if self.rank == 0:
            Fence(self.saver.run_dir, self.record).claim()

    def upload(self, files: list[Path]) -> None:
        is_commit = files[0].name == MANIFEST
        if self.fails_to_commit if is_commit else self.fails_to_upload:
            raise OSError("the bucket refuses")

    def write(self, folder: Path) -> None:
        if self.fails_to_write:
            raise OSError("the disk refuses")
        (folder / f"rng_state_{self.rank}.pth").write_text("state")

    def step(self) -> list[bool]:
        control = TrainerControl()
        self.saver.on_step_end(None, TrainerState(), control)
        return [control.should_save, control.should_training_stop]

    def save(self) -> None:
        self.saver.save(2, None, self.write)
        self.saver.finish()


def a_write_fails_on_rank_1(rank: Rank) -> None:
    rank.fails_to_write = rank.rank == 1
    rank.save()


def an_upload_fails_on_rank_1(rank: Rank) -> None:
    rank.fails_to_upload = rank.rank == 1
    rank.save()


def the_commit_fails_on_rank_0(rank: Rank) -> None:
    rank.fails_to_commit = True
    rank.save()


def the_bucket_is_gone_on_rank_1(rank: Rank) -> None:
    if rank.rank == 1:
        rank.saver.file_system = -1
    rank.save()


def the_notice_reaches_rank_1(rank: Rank) -> list[bool]:
    rank.notice.received_at = 1.0 if rank.rank == 1 else None
    return rank.step()


def the_notice_reaches_rank_1_in_an_evaluation(rank: Rank) -> int:
    """How many batches were evaluated before the evaluation was given up."""
    for batch in range(10):
        if batch == 3 and rank.rank == 1:
            rank.notice.received_at = 1.0
        try:
            rank.saver.on_prediction_step(None, TrainerState(), TrainerControl())
        except EvaluationAbandoned:
            return batch
    return 10


def it_is_time_on_the_clock_of_rank_0(rank: Rank) -> list[bool]:
    rank.now = 100.0 if rank.rank == 0 else 0.0
    return rank.step()


def it_is_time_on_the_clock_of_rank_1(rank: Rank) -> list[bool]:
    rank.now = 100.0 if rank.rank == 1 else 0.0
    return rank.step()


def a_newer_launch_is_seen_by_rank_0_between_two_saves(rank: Rank) -> None:
    rank.be_replaced()
    if rank.rank == 0:
        assert rank.saver.fence is not None
        rank.saver.fence.look()
    rank.step()


def a_newer_launch_comes_before_a_save(rank: Rank) -> None:
    rank.be_replaced()
    rank.save()


def a_newer_launch_comes_before_the_commit(rank: Rank) -> None:
    rank.saver.save(2, None, rank.write)
    rank.be_replaced()
    rank.saver.finish()


SCENARIOS: tuple[Callable[[Rank], Any], ...] = (
    a_write_fails_on_rank_1,
    an_upload_fails_on_rank_1,
    the_commit_fails_on_rank_0,
    the_bucket_is_gone_on_rank_1,
    the_notice_reaches_rank_1,
    the_notice_reaches_rank_1_in_an_evaluation,
    it_is_time_on_the_clock_of_rank_0,
    it_is_time_on_the_clock_of_rank_1,
    a_newer_launch_is_seen_by_rank_0_between_two_saves,
    a_newer_launch_comes_before_a_save,
    a_newer_launch_comes_before_the_commit,
)


def main(folder: Path) -> None:
    happened: dict[str, Any] = {}
    for scenario in SCENARIOS:
        rank = Rank(folder / scenario.__name__)
        try:
            happened[scenario.__name__] = scenario(rank)
        except (UserError, FencedOff) as error:
            happened[scenario.__name__] = str(error)
    (folder / f"{PartialState().process_index}.json").write_text(json.dumps(happened))


if __name__ == "__main__":
    PartialState(cpu=True)
    main(Path(sys.argv[1]))
    PartialState().wait_for_everyone()
    # Ends at once: a thread of torch 2.13.0's gloo that frees gathered tensors while Python shuts
    # down aborts the process.
    os._exit(0)
