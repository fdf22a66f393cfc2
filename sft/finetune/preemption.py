"""SIGTERM is a notice: save, then leave. Slurm, Kubernetes and machines that shut down send it."""

import os
import signal
import time
from types import FrameType

EXIT_STATUS = 128 + signal.SIGTERM
# torch's launcher hands on a signal that the ranks, in its process group, have got already.
SAME_NOTICE_SECONDS = 5.0


class PreemptionNotice:
    """Whether SIGTERM has come since listen(); a second one ends the process at once."""

    def __init__(self) -> None:
        self.received_at: float | None = None  # by time.monotonic

    def listen(self) -> None:
        """Take SIGTERM over. Called by train.py alone, once there is something to save."""
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received_at is None:
            self.received_at = now
        elif now - self.received_at > SAME_NOTICE_SECONDS:
            os._exit(EXIT_STATUS)

    @property
    def received(self) -> bool:
        return self.received_at is not None
