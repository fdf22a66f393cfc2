"""Saves in the background while training goes on; stops it on a notice or when a save has failed.

    step N: copy to host memory (all that training waits for) -> training goes on
    behind: torch DCP writes -> hash -> in the bucket -> manifest -> in the bucket -> prune

Ranks sync_ranks after every step, by one all_reduce of four numbers on CPU, on what to do next.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from transformers import TrainerCallback, TrainerControl, TrainerState

from finetune.checkpoint.bucket import await_upload
from finetune.checkpoint.manifest import (
    check_complete,
    checkpoints,
    files_of_rank,
    manifest_entries,
    prune,
    write_manifest,
)
from finetune.errors import UserError
from finetune.preemption import PreemptionNotice

FULL_BYTES = 2**20


class Saver(TrainerCallback):
    """Decides with the other ranks when to save, and carries each save to its end."""

    def __init__(
        self,
        run_dir: Path,
        *,
        notice: PreemptionNotice,
        every_minutes: float,
        keep: int | None,
        manifest: dict[str, Any],
    ) -> None:
        self.run_dir = run_dir
        self.every_seconds = every_minutes * 60
        self.keep = keep
        self.manifest = manifest
        self.notice = notice
        self.preempted, self.noticed_at = False, 0.0
        self.stall_seconds = 0.0  # training stood still for this long
        self.is_waiting = False  # for the save before this one to end
        self.saving: Path | None = None  # the same on every rank, until its manifest is durable
        self.described = False
        self.pending: Future[Any] | None = None  # what this rank does for it in the background
        self.last_step, self.last_saved = -1, time.monotonic()
        self.file_system = run_dir.stat().st_dev
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        is_cuda = torch.cuda.is_available()
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=is_cuda,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=is_cuda,
            )
        )
        distributed = dist.is_available() and dist.is_initialized()
        # Two groups of their own, on CPU: DCP's collectives run in a thread, at any time.
        # An upload may take longer than a collective of training; a hung rank is the watchdog's.
        patience = timedelta(days=1)
        self.step_group = dist.new_group(backend="gloo", timeout=patience) if distributed else None
        self.dcp_group = dist.new_group(backend="gloo", timeout=patience) if distributed else None

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        due = time.monotonic() - self.last_saved > self.every_seconds
        if self.sync_ranks(due):
            control.should_save = True
        if self.preempted:
            control.should_save = control.should_training_stop = True

    def sync_ranks(self, due: bool = False) -> bool:
        """One word from every rank; returns whether to save now. Raises UserError on a failure."""
        done = self.pending is None or self.pending.done()
        failed = done and self.pending is not None and self.pending.exception() is not None
        is_first = PartialState().is_main_process  # one clock decides
        votes = torch.tensor([self.notice.received, due and is_first, failed, not done])
        votes = votes.to(torch.int32)
        if self.step_group is not None:
            dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.step_group)
        noticed, due, failed, busy = votes.bool().tolist()
        if noticed and not self.preempted:
            self.preempted, self.noticed_at = True, self.notice.received_at or time.monotonic()
        if failed:
            self.report_failure(self.pending.exception() if self.pending and done else None)
        if self.saving is not None and not busy:
            self.next_phase()
        return due and self.saving is None

    def save(
        self, step: int, state_dict: dict[str, Any] | None, write: Callable[[Path], None]
    ) -> None:
        """Start saving a checkpoint: state_dict by DCP, what `write` writes into its folder.

        Returns when both may change again. The save before is brought to its end first.
        """
        started = time.monotonic()
        folder = self.run_dir / f"checkpoint-{step}"
        if step == self.last_step:
            return
        self.finish()
        missing = next(filter(None, self.gather(self.mount_problem())), None)
        if missing is not None:
            raise UserError(missing)
        if PartialState().is_main_process:
            shutil.rmtree(folder, ignore_errors=True)  # torn by a launch before this one
        self.barrier()
        error: Exception | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)  # other nodes see the bucket's folders late
            write(folder)
        except (OSError, RuntimeError) as failure:  # torch.save makes the one of the other
            error = failure
        self.saving, self.described = folder, False
        self.report_failure(error)
        written = None
        if state_dict is not None:
            written = cast(
                Future[Any],
                dcp.async_save(
                    state_dict,
                    checkpoint_id=folder,
                    process_group=self.dcp_group,
                    async_stager=self.stager,
                ),
            )
        self.pending = self.executor.submit(self.write_and_upload, folder, written)
        self.last_step, self.last_saved = step, time.monotonic()
        self.stall_seconds += self.last_saved - started

    def write_and_upload(
        self, folder: Path, written: Future[Any] | None
    ) -> dict[str, dict[str, Any]]:
        """In the background: this rank's files, written and in the bucket, as manifest entries."""
        if written is not None:
            written.result()
        files = files_of_rank(folder, rank=PartialState().process_index)
        entries = manifest_entries(folder, files)
        await_upload(files)
        return entries

    def next_phase(self) -> None:
        """No rank is busy: from the files to the manifest, or from the manifest to the end."""
        assert self.saving is not None
        if self.described:
            self.saving = self.pending = None
            return
        entries = self.gather(self.pending.result() if self.pending else {})
        self.described, self.pending = True, None
        if PartialState().is_main_process:
            files = {name: entry for share in entries for name, entry in share.items()}
            self.pending = self.executor.submit(self.commit, self.saving, files)

    def commit(self, folder: Path, files: dict[str, dict[str, Any]]) -> None:
        """In the background of the first rank: make the checkpoint whole, then drop older ones."""
        missing = self.mount_problem()
        if missing is not None:
            raise UserError(missing)
        manifest = self.manifest | {"stall_seconds": round(self.stall_seconds, 3), "files": files}
        await_upload([write_manifest(folder, manifest)])
        prune(folder, keep=self.keep)

    def finish(self) -> None:
        """Bring the save under way to its end, durable, on every rank."""
        self.is_waiting = True
        while self.saving is not None:
            if self.pending is not None:
                wait([self.pending])
            self.sync_ranks()
        self.is_waiting = False

    def mount_problem(self) -> str | None:
        """That run_dir is not in the file system it was: unmounted, or gone; or None."""
        try:
            same = self.run_dir.stat().st_dev == self.file_system
        except OSError:
            same = False
        return None if same else f"{self.run_dir} is no longer mounted: is the bucket gone?"

    def report_failure(self, error: BaseException | None) -> None:
        """Raise UserError on every rank for the first rank that has an error, if one has."""
        reasons = self.gather(None if error is None else self.reason_for(error))
        failures = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
        if not failures:
            return
        rank, reason = failures[0]
        whole = next(
            (f.name for f in checkpoints(self.run_dir) if check_complete(f) is None), "none"
        )
        raise UserError(
            f"saving {self.saving} failed on rank {rank}: {reason}; "
            f"training stops, the last whole checkpoint is {whole}"
        )

    def reason_for(self, error: BaseException) -> str:
        """One line for an error, of DCP's wrapped ones the first."""
        if isinstance(error, CheckpointException) and error.failures:
            error = next(iter(error.failures.values()))[0]
        if isinstance(error, RuntimeError) and shutil.disk_usage(self.run_dir).free < FULL_BYTES:
            return os.strerror(errno.ENOSPC)  # which torch's own writer does not say
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"

    def gather(self, value: Any) -> list[Any]:
        if self.step_group is None:
            return [value]
        values = [None] * dist.get_world_size(self.step_group)
        dist.all_gather_object(values, value, group=self.step_group)
        return values

    def barrier(self) -> None:
        if self.step_group is not None:
            dist.barrier(group=self.step_group)
