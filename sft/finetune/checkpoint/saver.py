"""Saves checkpoints in the background while training goes on, and stops a run when it must stop.

    the step that saves     copy the weights to host memory; training waits only for this
    WRITING, each rank      torch DCP writes the copy -> hash the files -> await their upload
    COMMITTING, rank 0      write the manifest -> await its upload -> delete old checkpoints

After every step, and after every batch of an evaluation, the ranks all-reduce five votes (on CPU,
by gloo), so that all of them enter and leave a phase, save, stop or fail at the same moment.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from packaging.version import Version
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from transformers import TrainerCallback, TrainerControl, TrainerState

from finetune.checkpoint import bucket
from finetune.checkpoint.fence import Fence, FencedOff
from finetune.checkpoint.manifest import (
    checkpoint_name,
    files_of_rank,
    manifest_entries,
    newest_checkpoint,
    write_manifest,
)
from finetune.checkpoint.ownership import check_not_in_the_way, prune
from finetune.errors import UserError
from finetune.preemption import PreemptionNotice

# A disk with less free space counts as full: a write that failed for lack of space may have left
# a little of it.
FULL_BYTES = 2**20
# An upload may take longer than any collective of training, and ranks wait here for each other's.
# A rank that hangs is found by the watchdog (training/watchdog.py), not by this timeout.
COLLECTIVE_TIMEOUT = timedelta(days=1)
# How long a save may take before training goes on without beginning the next one.
LONGEST_SAVE_SECONDS = 600.0
# torch before 2.13 closes a stager after each save, also one that it was given: its second save
# would end the run. Delete this where no cluster's own image has such a torch.
CLOSES_STAGERS = Version(torch.__version__) < Version("2.13")
# How often ranks that wait for an upload vote meanwhile.
SECONDS_BETWEEN_VOTES = 1.0

Entries = dict[str, dict[str, Any]]  # of the manifest: size and SHA-256 of each file


class Phase(Enum):
    """How far the save under way is. All ranks are in the same phase."""

    IDLE = auto()  # there is no save under way
    WRITING = auto()  # each rank writes, hashes and uploads its own files
    COMMITTING = auto()  # rank 0 writes and uploads the manifest, then deletes old checkpoints


class Votes(NamedTuple):
    """What one rank reports after a step; after the all-reduce, what holds for any rank."""

    notice: bool  # SIGTERM was received
    due: bool  # it is time for another save
    failed: bool  # the background job ended with an error
    running: bool  # the background job has not ended
    fenced: bool  # a newer launch continues the run


class EvaluationAbandoned(Exception):
    """A notice came: raised on all ranks after the same batch of the evaluation."""


def free_bytes(folder: Path) -> int:
    """The free space of the disk that holds the folder."""
    return shutil.disk_usage(folder).free


def make_stager() -> DefaultStager:
    """What copies tensors to host memory for torch DCP, while training waits.

    The copy is synchronous, since the next optimizer step changes the tensors that are copied.
    Shared memory is for a checkpointer in another process; here a thread writes.
    """
    is_cuda = torch.cuda.is_available()
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=is_cuda,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=is_cuda,
        )
    )


class Saver(TrainerCallback):
    """Decides together with the other ranks when to save, and sees each save through to its end.

    Public state: `preempted` (SIGTERM reached a rank) and `noticed_at` (when, by the clock);
    `complete_step` (of the newest checkpoint that this launch has completed); `stall_seconds` (how
    long training has waited for saves so far); `is_waiting` (finish() runs).

    fence: this launch's claim to the run; without one there is no other launch. await_upload, clock
    (seconds) and free_bytes are parameters so that tests can replace them.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        notice: PreemptionNotice,
        every_minutes: float,
        keep: int | None,
        manifest: dict[str, Any],
        fence: Fence | None = None,
        await_upload: Callable[[list[Path]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[Path], int] = free_bytes,
    ) -> None:
        self.run_dir = run_dir
        self.notice = notice
        self.every_seconds = every_minutes * 60
        self.keep = keep
        self.manifest = manifest
        self.fingerprint: dict[str, Any] = manifest.get("fingerprint", {})
        self.fence = fence
        self.clock, self.free_bytes = clock, free_bytes

        self.preempted, self.noticed_at = False, 0.0
        self.complete_step: int | None = None
        self.stall_seconds = 0.0
        self.is_waiting = False
        self.is_abandoned = False
        # Training goes on beside a bucket that refuses, and may see it mended.
        self.await_upload = await_upload or partial(
            bucket.await_upload,
            is_patient=lambda: not self.is_waiting,
            is_abandoned=lambda: self.is_abandoned,
        )

        self.phase = Phase.IDLE
        self.folder: Path | None = None  # the checkpoint that is being saved
        self.job: Future[Any] | None = None  # this rank's background work for it
        self.last_step, self.last_saved = -1, clock()
        # A bucket that is unmounted leaves an empty folder on the node's disk in its place.
        self.file_system = run_dir.stat().st_dev
        # One worker, since the jobs of a save follow each other and saves never overlap.
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        # One stager for all saves: it keeps the pinned host buffers of the first save and fills
        # them again, while a new stager would pin all of them anew, with training waiting.
        self.stager = make_stager()
        # Two gloo groups of our own. Collectives of one group must be issued in the same order on
        # all ranks. DCP issues its own from a background thread at any time, so they cannot share
        # a group with the main thread's. And gloo, since DCP saves from CPU memory and NCCL would
        # queue the votes behind the GPU's work.
        distributed = dist.is_available() and dist.is_initialized()
        self.step_group = self.dcp_group = None
        if distributed:
            self.step_group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
            self.dcp_group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)

    def claim_run(self) -> None:
        """Make this the launch that continues the run. Called by all ranks, once they are ready.

        Raises FencedOff on all of them if another launch has claimed it at the same moment, and
        UserError if the launch before trains something else, or the claim cannot be written.
        """
        problem = None
        if self.fence is not None and PartialState().is_main_process:
            try:
                self.fence.claim()
            except UserError as error:
                problem = str(error)
            except OSError as error:
                problem = f"{error.filename} cannot be written ({error.strerror})"
        self.raise_together(problem)
        self.check_fence()

    def check_fence(self) -> None:
        """Raise FencedOff on all ranks if there is a newer launch by now. Called by all ranks."""
        is_looking = self.fence is not None and PartialState().is_main_process
        newer = self.gather(self.fence.look() if self.fence and is_looking else None)[0]
        if newer is not None:
            raise FencedOff(newer)

    def promise_to_save(self) -> None:
        """From here on a notice does not end the process: there will be a step to save. Called by
        all ranks.
        """
        self.barrier()  # a rank that ended now would leave others waiting in the first step
        self.notice.promise = "SIGTERM: training saves what is done, and ends"

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell Trainer to save if a save is due; after a notice, to save and stop."""
        if self.sync_ranks(due=self.clock() - self.last_saved > self.every_seconds):
            control.should_save = True
        if self.preempted:
            control.should_save = control.should_training_stop = True

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise EvaluationAbandoned on all ranks after a notice to one of them. An evaluation may
        take longer than the time that a notice leaves. All ranks have equally many batches.
        """
        self.sync_ranks()
        if self.preempted:
            raise EvaluationAbandoned

    def sync_ranks(self, *, due: bool = False) -> bool:
        """All-reduce the votes of all ranks and act on them; return whether to save now.

        Called by all ranks. Raises UserError on all of them if a save has failed on one, FencedOff
        if a newer launch continues the run.
        """
        votes = self.vote(due)
        anywhere = self.all_reduce(votes)
        if anywhere.notice and not self.preempted:
            self.preempted, self.noticed_at = True, self.notice.received_at or self.clock()
        if anywhere.fenced or anywhere.failed:
            self.check_fence()  # a save may fail because the newer launch has removed its folder
        if anywhere.failed:
            # A job may have failed since this rank voted: only what was voted on is reported.
            self.report_failure(self.job.exception() if votes.failed and self.job else None)
        if not anywhere.running:
            self.next_phase()
        # A save that comes due while another one runs waits for it: `due` is voted on again after
        # the next step.
        return anywhere.due and self.phase is Phase.IDLE

    def vote(self, due: bool) -> Votes:
        """What this rank reports. due: by this rank's clock."""
        running = self.job is not None and not self.job.done()
        return Votes(
            notice=self.notice.received,
            # Rank 0's clock decides alone. The ranks' clocks pass the limit at slightly different
            # times, and with all of them the fastest one would set the interval.
            due=(due and PartialState().is_main_process) or self.notice.save_requested,
            failed=self.job is not None and not running and self.job.exception() is not None,
            running=running,
            # Read last: a job that failed because of it has set it before.
            fenced=self.fence is not None and self.fence.newer is not None,
        )

    def all_reduce(self, votes: Votes) -> Votes:
        """For each vote, whether any rank has cast it."""
        if self.step_group is None:
            return votes
        tensor = torch.tensor(votes, dtype=torch.int32)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.step_group)
        return Votes(*tensor.bool().tolist())

    def save(
        self,
        step: int,
        state_dict: dict[str, Any] | None,
        write: Callable[[Path], None],
        *,
        required: bool = True,
    ) -> None:
        """Start saving a checkpoint: state_dict by torch DCP (None: nothing), and small files by
        `write`, which is given the checkpoint's folder.

        Called by all ranks. Returns as soon as training may change the tensors again. Does nothing
        if this step has been saved; nor, unless it is required, if the save before takes too long:
        another is due as soon as that has ended. Raises UserError on all ranks if one fails,
        FencedOff if a newer launch continues the run.
        """
        # Trainer may ask twice at one step: at the step's end and at its epoch's.
        if step == self.last_step:
            return
        started = self.clock()
        self.notice.save_requested = False
        # The save before this one must have ended: the stager's buffers are about to be filled
        # again, and while they are still being written that would corrupt its files.
        if not self.finish(gives_up=None if required else self.is_slow):
            assert self.folder is not None
            PartialState().print(
                f"checkpoint-{step} is not saved: {self.folder.name} is still on its way "
                f"after {(started - self.last_saved) / 60:.0f} min",
                flush=True,
            )
            return
        self.check_fence()
        self.raise_together(self.mount_problem())
        self.folder = self.new_folder(step)
        self.report_failure(self.write_small_files(self.folder, write))
        written = self.start_dcp(self.folder, state_dict)
        self.job = self.executor.submit(self.write_and_upload, self.folder, written)
        self.phase = Phase.WRITING
        self.last_step, self.last_saved = step, self.clock()
        self.stall_seconds += self.last_saved - started

    def raise_together(self, problem: str | None) -> None:
        """Raise UserError on all ranks if one of them has a problem."""
        for found in self.gather(problem):
            if found is not None:
                raise UserError(found)

    def new_folder(self, step: int) -> Path:
        """This launch's folder for that step, on all ranks; what is left in it of a version that
        named folders by their step alone is deleted.

        Raises UserError on all ranks if it holds what is not this run's.
        """
        writer = self.fence.writer if self.fence is not None else None  # the first rank's
        folder, problem = self.run_dir / checkpoint_name(step, writer.number if writer else 1), None
        if PartialState().is_main_process:
            try:
                check_not_in_the_way(folder, self.fingerprint)
                shutil.rmtree(folder, ignore_errors=True)
            except UserError as error:
                problem = str(error)
        self.raise_together(problem)  # and no rank writes before rank 0 has deleted
        return cast(Path, self.gather(folder)[0])

    def write_small_files(self, folder: Path, write: Callable[[Path], None]) -> Exception | None:
        """Call `write` on the folder; return the error, which the ranks have yet to share."""
        try:
            # Every rank makes it: a node sees the folders that another made in the bucket late.
            folder.mkdir(parents=True, exist_ok=True)
            write(folder)
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a full disk
            return error
        return None

    def start_dcp(self, folder: Path, state_dict: dict[str, Any] | None) -> Future[Any] | None:
        """Copy the tensors to host memory and let torch DCP write them in a thread of its own."""
        if state_dict is None:
            return None
        if CLOSES_STAGERS:
            self.stager = make_stager()
        written = dcp.async_save(
            state_dict,
            checkpoint_id=folder,
            process_group=self.dcp_group,
            async_stager=self.stager,
        )
        return cast(Future[Any], written)  # an AsyncSaveResponse only if staging is asynchronous

    def write_and_upload(self, folder: Path, written: Future[Any] | None) -> Entries:
        """The background job of WRITING: return the manifest's entries of this rank's files once
        the files are in the bucket.
        """
        if written is not None:
            written.result()
        files = files_of_rank(folder, rank=PartialState().process_index)
        entries = manifest_entries(folder, files)
        self.await_upload(files)
        return entries

    def next_phase(self) -> None:
        """Go on to the next phase. Called when no rank's job is running and none has failed."""
        match self.phase:
            case Phase.IDLE:
                pass
            case Phase.WRITING:
                self.start_commit()
                self.phase = Phase.COMMITTING
            case Phase.COMMITTING:
                self.complete_step = self.last_step
                self.folder = self.job = None
                self.phase = Phase.IDLE

    def start_commit(self) -> None:
        """Gather the manifest's entries of all ranks; rank 0 commits, the others have no job."""
        assert self.folder is not None and self.job is not None
        shares = self.gather(self.job.result())
        self.job = None
        if PartialState().is_main_process:
            entries = {name: entry for share in shares for name, entry in share.items()}
            self.job = self.executor.submit(self.commit, self.folder, entries)

    def commit(self, folder: Path, entries: Entries) -> None:
        """The background job of COMMITTING, on rank 0: after it the checkpoint is complete.

        The manifest comes last. The bucket receives files in any order, and so a manifest that was
        written earlier could be there, after a loss of the node, without the files that it lists.
        """
        # Without this, the manifest of a bucket that is gone would land on the node's own disk.
        problem = self.mount_problem()
        if problem is not None:
            raise UserError(problem)
        if self.fence is not None:
            self.fence.check()
        manifest = self.manifest | {
            "stall_seconds": round(self.stall_seconds, 3),
            "files": entries,
        }
        self.await_upload([write_manifest(folder, manifest)])
        # Only now: until the manifest is in the bucket, the checkpoint before is the newest one
        # that a new node would find.
        if self.fence is not None:
            self.fence.check()
        prune(folder, keep=self.keep, fingerprint=self.fingerprint)

    def finish(self, *, gives_up: Callable[[], bool] | None = None) -> bool:
        """Return when the save under way, if there is one, is complete and in the bucket: True.
        False if gives_up, which must be the same on all ranks, ends the wait before that.

        Must be called by all ranks, since each phase ends with collectives of all of them. Raises
        UserError on all ranks if the save fails, FencedOff if a newer launch continues the run.
        """
        while self.phase is not Phase.IDLE:
            if gives_up is not None and gives_up():
                break
            self.is_waiting = True
            if self.job is not None:
                wait([self.job], timeout=SECONDS_BETWEEN_VOTES)
            self.sync_ranks()
        self.is_waiting = False
        return self.phase is Phase.IDLE

    def is_slow(self) -> bool:
        """Whether the save under way has taken too long, by the clock of the first rank."""
        return bool(self.gather(self.clock() - self.last_saved > LONGEST_SAVE_SECONDS)[0])

    def mount_problem(self) -> str | None:
        """A message if run_dir is not in the file system that it was in at the start, or None."""
        try:
            same = self.run_dir.stat().st_dev == self.file_system
        except OSError:
            same = False
        return None if same else f"{self.run_dir} is no longer mounted: is the bucket gone?"

    def report_failure(self, error: BaseException | None) -> None:
        """Raise UserError on all ranks if one of them has an error; it names the first such rank.

        Called by all ranks, with None where nothing failed: if only one rank raised, the others
        would wait for it in their next collective.
        """
        reasons = self.gather(None if error is None else self.reason_for(error))
        for rank, reason in enumerate(reasons):
            if reason is not None:
                self.is_abandoned = True
                newest = newest_checkpoint(self.run_dir)
                raise UserError(
                    f"saving {self.folder} failed on rank {rank}: {reason}; training stops, "
                    f"the last complete checkpoint is {newest.name if newest else 'none'}"
                )

    def reason_for(self, error: BaseException) -> str:
        """One line for an error. DCP raises one CheckpointException for the errors of all ranks:
        the first of those is named.
        """
        if isinstance(error, CheckpointException) and error.failures:
            error = next(iter(error.failures.values()))[0]
        # torch's zip writer raises a RuntimeError about positions in a file when the disk is full.
        if isinstance(error, RuntimeError) and self.free_bytes(self.run_dir) < FULL_BYTES:
            return os.strerror(errno.ENOSPC)
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, in their order, on all ranks."""
        if self.step_group is None:
            return [value]
        values = [None] * dist.get_world_size(self.step_group)
        dist.all_gather_object(values, value, group=self.step_group)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.step_group is not None:
            dist.barrier(group=self.step_group)
