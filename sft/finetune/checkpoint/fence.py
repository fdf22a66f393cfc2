"""One run, one writer: the newest launch of a run goes on, and an older one stops by itself.

A launch that is ready to train claims the run by a file of its own in writers/. On a mounted bucket
it then waits until every other node must have seen that file, and looks whether it is the newest.
A launch that sees a newer one's file is fenced off: it writes and deletes nothing any more.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.checkpoint.bucket import await_upload, rclone_mount
from finetune.checkpoint.fingerprint import RunRecord
from finetune.checkpoint.writers import (
    Writer,
    check_newest_writer,
    file_of,
    has_double,
    launch_numbers,
    new_writer,
    newest_writer,
    write_writer,
)

# SkyPilot 0.14.1 mounts a bucket with rclone's --dir-cache-time 10s: for so long a node may list a
# folder as it was. The two seconds more are for the request itself.
LISTING_LAG_SECONDS = 12.0
SECONDS_BETWEEN_LOOKS = 5.0


class FencedOff(Exception):
    """A newer launch has claimed this run: raised on all ranks at the same moment."""

    def __init__(self, newer: Writer) -> None:
        super().__init__(f"fenced off: a newer launch continues this run: {newer}")
        self.newer = newer


def listing_lag(run_dir: Path) -> float:
    """Seconds after which every node sees a file that one of them has written."""
    return 0.0 if rclone_mount(run_dir) is None else LISTING_LAG_SECONDS


class Fence:
    """This launch's claim to its run. Used by the first process alone; the Saver tells the others.

    Public state: `writer` (this launch, once it has claimed the run), `newer` (the launch that has
    claimed it since, once that has been seen).

    await_upload, listing_lag and sleep are parameters for tests.
    """

    def __init__(
        self,
        run_dir: Path,
        record: RunRecord,
        *,
        ignore_fingerprint: bool = False,
        await_upload: Callable[[list[Path]], None] = await_upload,
        listing_lag: Callable[[Path], float] = listing_lag,
        sleep: Callable[[float], Any] = time.sleep,
    ) -> None:
        self.run_dir, self.record = run_dir, record
        self.ignore_fingerprint = ignore_fingerprint
        self.await_upload, self.listing_lag, self.sleep = await_upload, listing_lag, sleep
        self.writer: Writer | None = None
        self.newer: Writer | None = None
        self.is_closed = threading.Event()

    def claim(self) -> None:
        """Make this the newest launch, and begin to look out for newer ones.

        Raises UserError if the newest one before trains something else, OSError if the claim
        cannot be written, or those of others not read. Afterwards `newer` is set if another launch
        claimed the run meanwhile.
        """
        if not self.ignore_fingerprint:
            check_newest_writer(self.run_dir, self.record)
        before = newest_writer(self.run_dir)
        numbers = [*launch_numbers(self.run_dir), before.number if before else 0]
        writer = self.claim_number(max(numbers) + 1)
        # A launch that has claimed the run at the same moment may have taken the same number, which
        # is in the names of checkpoints: the one that goes on takes the next.
        while self.look() is None and has_double(writer, self.run_dir):
            double, writer = writer, self.claim_number(writer.number + 1)
            file_of(double, self.run_dir).unlink(missing_ok=True)
        threading.Thread(target=self.watch, name="fence", daemon=True).start()

    def claim_number(self, number: int) -> Writer:
        """Write this launch's file, and return when every other launch must see it."""
        self.writer = new_writer(number, self.record.identity())
        self.await_upload([write_writer(self.writer, self.run_dir)])
        self.sleep(self.listing_lag(self.run_dir))
        return self.writer

    def look(self) -> Writer | None:
        """The newer launch, if there is one by now."""
        if self.writer is not None and self.newer is None:
            try:
                newest = newest_writer(self.run_dir)
            except OSError:  # the bucket is gone: the save that needs it says so
                return None
            if newest is not None and newest > self.writer:
                self.newer = newest
        return self.newer

    def watch(self) -> None:
        """The thread: look every few seconds. Listing a bucket's folder would hold training up."""
        while not self.is_closed.wait(SECONDS_BETWEEN_LOOKS) and self.look() is None:
            pass

    def check(self) -> None:
        """Raise FencedOff if there is a newer launch by now. For one process, before it acts."""
        newer = self.look()
        if newer is not None:
            raise FencedOff(newer)

    def withdraw(self, *, has_saved: bool) -> None:
        """Forget the claim of a launch that leaves no complete checkpoint: other settings may be
        tried, and an older launch that has not noticed the claim yet goes on.

        has_saved: it has begun to save one. Then its number stays taken, since its files may yet
        reach the bucket.
        """
        self.is_closed.set()
        if self.writer is not None and self.newer is None:
            with suppress(OSError):  # what ended the launch is what the user must read
                if has_saved:
                    write_writer(replace(self.writer, fingerprint={}), self.run_dir)
                else:
                    file_of(self.writer, self.run_dir).unlink(missing_ok=True)
            self.writer = None
