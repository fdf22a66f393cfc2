"""SIGTERM as a notice of preemption: the run saves a checkpoint and ends.

Slurm, Kubernetes and machines that shut down send it some time before they kill a process. So does
finetune/spot_notice.py when a cloud says that it takes the machine back.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

EXIT_STATUS = 128 + signal.SIGTERM  # what a shell reports for a process that the signal ended
NOTHING_TO_SAVE = (
    "preempted before training began: there is nothing to save; "
    "the next launch goes on from the newest complete checkpoint, if there is one"
)


class PreemptionNotice:
    """Whether SIGTERM was received since listen().

    save_requested: a checkpoint is wanted soon, and training goes on. Whoever saves sets it back.
    promise: what is done about a notice, as a line for the log. As long as it is None there is
    nothing to save, and a notice ends the process at once. A second SIGTERM changes nothing: one
    signal to a process group reaches a rank twice, directly and from torch's launcher, and a save
    that goes on must not be lost by it. Who will not wait sends SIGKILL.
    """

    def __init__(self) -> None:
        self.received_at: float | None = None  # seconds, by time.monotonic
        self.promise: str | None = None
        self.save_requested = False
        self.pid = os.getpid()

    def listen(self) -> None:
        """Handle SIGTERM from now on, instead of ending. Only scripts call this; whatever else
        makes a Saver keeps the process's own handling.
        """
        # Python runs a handler when the main thread is back from C, and that may wait for another
        # rank there, for minutes. So a thread of its own answers, woken by a byte in a pipe.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=forget_wakeup)
        threading.Thread(target=self.answer, args=[reader], name="notice", daemon=True).start()
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler: it only notes the time, and the Saver reads it after the step."""
        if os.getpid() != self.pid:  # a forked worker, which its pool ends by SIGTERM
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif self.received_at is None:
            self.received_at = time.monotonic()

    def answer(self, reader: int) -> None:
        """The thread: say once what is done about the notice; if nothing can be, end at once."""
        while signal.SIGTERM not in os.read(reader, 4096):  # a byte is the number of a signal
            pass
        self.receive(signal.SIGTERM, None)
        if os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # whoever read the log may be gone
                print(self.promise or NOTHING_TO_SAVE, flush=True)
        if self.promise is None:
            os._exit(EXIT_STATUS)

    def request_save(self) -> None:
        """Ask for a checkpoint after the step under way."""
        self.save_requested = True

    @property
    def received(self) -> bool:
        return self.received_at is not None


def forget_wakeup() -> None:
    """In a forked worker: signals to it are none of its parent's business."""
    signal.set_wakeup_fd(-1)


class OutliveNotice:
    """A worker_init_fn for a DataLoader whose workers go on after SIGTERM: the step that will be
    saved needs their batches. They end with their rank.

    worker_init_fn: the one of before, which is called too.
    """

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        self.worker_init_fn = worker_init_fn

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # in place of torch's own handler, which ends
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker)
