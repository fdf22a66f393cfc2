"""SIGTERM as a notice of preemption: the run saves a checkpoint and ends.

Slurm, Kubernetes and machines that shut down send it some time before they kill a process.
"""

import os
import signal
import time
from types import FrameType

EXIT_STATUS = 128 + signal.SIGTERM  # what a shell reports for a process that the signal ended
# One SIGTERM to a process group reaches a rank twice: directly, and again from torch's launcher,
# which forwards it. Within this time the second one counts as the same notice.
SAME_NOTICE_SECONDS = 5.0


class PreemptionNotice:
    """Whether SIGTERM was received since listen(). A second one ends the process at once."""

    def __init__(self) -> None:
        self.received_at: float | None = None  # seconds, by time.monotonic

    def listen(self) -> None:
        """Handle SIGTERM from now on, instead of ending. Only train.py calls this, once there is
        something to save; whatever else makes a Saver keeps the process's own handling.
        """
        signal.signal(signal.SIGTERM, self.receive)

    def receive(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler: it only notes the time, and the Saver reads it after the step."""
        now = time.monotonic()
        if self.received_at is None:
            self.received_at = now
        elif now - self.received_at > SAME_NOTICE_SECONDS:
            os._exit(EXIT_STATUS)

    @property
    def received(self) -> bool:
        return self.received_at is not None
