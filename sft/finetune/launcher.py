"""Processes that end when the one that started them is gone.

A launcher that is killed cannot end its ranks. They would train, save and delete checkpoints
beside the launch that replaces them.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

SECONDS_BETWEEN_CHECKS = 0.2
PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


def end_with_launcher(*, is_saving: Callable[[], bool]) -> None:
    """From now on, end this rank with status 1 soon after the launcher that started it has ended.
    A script that was started by hand has no launcher, and may outlive its shell.

    is_saving: whether this rank is saving because of a notice. Then it has as long to do so as a
    launcher would have given it: a notice to all processes may end the launcher first.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    # The kernel can send a signal at once (as below, to workers), but not wait for a save.
    watch = threading.Thread(
        target=end_after, args=[os.getppid(), is_saving], name="launcher", daemon=True
    )
    watch.start()


def end_after(launcher: int, is_saving: Callable[[], bool]) -> None:
    """The thread: wait until the process `launcher` is no longer this one's parent, then end."""
    while os.getppid() == launcher:
        time.sleep(SECONDS_BETWEEN_CHECKS)
    deadline = time.monotonic() + float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30))
    while is_saving() and time.monotonic() < deadline:
        time.sleep(SECONDS_BETWEEN_CHECKS)
    if os.environ["LOCAL_RANK"] == "0":
        with suppress(OSError):  # whoever read the log may be gone too
            print(
                "error: the launcher of this rank has ended, or was killed: training stops without "
                "a save; launch again to go on from the newest complete checkpoint",
                file=sys.stderr,
                flush=True,
            )
    os._exit(1)


def terminate_shell() -> None:
    """Send SIGTERM to the shell that started this rank's launcher, if it was a shell.

    The shell of a recipe passes it on to what it runs, and ends with status 143, after which
    SkyPilot launches again. The launcher's own status is 1, whatever that of its ranks was.
    """
    with suppress(psutil.Error):  # one of them has ended
        shell = psutil.Process(os.getppid()).parent()
        if shell is not None and shell.name() in ("bash", "sh"):
            shell.terminate()


def end_workers_with_parent() -> None:
    """From now on, a process forked from this one or from a worker of its is killed when its parent
    ends. On Linux; elsewhere workers end when they next ask their parent for work.

    To the kernel the parent is the thread that forked. Data loaders and pools fork in the main one.
    """
    if sys.platform != "linux":
        return
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def before() -> None:
        nonlocal parent
        parent = os.getpid()

    def in_worker() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)

    os.register_at_fork(before=before, after_in_child=in_worker)
