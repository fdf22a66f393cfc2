"""A command that is run to its end, and never outlives this process."""

import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType

import psutil  # type: ignore[import-untyped]


def exit_on_signals() -> None:
    """Let SIGTERM and Ctrl-C end this process with status 143 and 130, after `finally` blocks."""

    def leave(signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, leave)


def run_to_end(command: list[str]) -> int:
    """Run a command and return its exit status, negative if a signal ended it.

    What it prints on stdout goes to stderr. If this process has to end first, so do the command and
    all processes that it has started.
    """
    # A session of its own: Ctrl-C in a terminal reaches this process only, which ends the others.
    child = subprocess.Popen(command, stdout=sys.stderr, start_new_session=True)
    try:
        return child.wait()
    finally:
        kill_with_descendants(child)


def kill_with_descendants(child: subprocess.Popen[bytes]) -> None:
    """End a process that may still run, and its descendants.

    Signalling its process group is not enough: torch's launcher starts each rank in a new session.
    """
    if child.poll() is not None:
        return
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(child.pid)
        process.suspend()  # so that it starts nothing more while its descendants are listed
        for descendant in process.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                descendant.kill()
        process.kill()
    child.wait()
