"""Real signals to a real process."""

import signal
import subprocess
import sys

from conftest import REPO
from preemption import EXIT_STATUS, SAME_NOTICE_SECONDS

PROGRAM = """
import signal
from preemption import PreemptionNotice
notice = PreemptionNotice()
while True:
    print(notice.received, flush=True)
    signal.pause()
"""


def test_the_second_signal_ends_the_process_but_not_the_launchers_echo() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=REPO / "sft", stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "False\n"
        for _ in ("notice", "echo"):
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "True\n"
        try:
            process.wait(SAME_NOTICE_SECONDS + 0.1)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        assert process.wait(10) == EXIT_STATUS
