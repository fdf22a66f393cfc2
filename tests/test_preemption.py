"""Real signals to a real process that listens for a notice of preemption."""

import signal
import subprocess
import sys

import pytest

from finetune.preemption import EXIT_STATUS, SAME_NOTICE_SECONDS
from helpers.paths import REPO

PROGRAM = """
import sys
from finetune.preemption import PreemptionNotice
notice = PreemptionNotice()
notice.listen()
for line in sys.stdin:
    print(notice.received, flush=True)
"""


def test_the_second_signal_ends_the_process_but_not_the_launchers_echo() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=REPO / "sft",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def has_received() -> str:
            assert process.stdin is not None and process.stdout is not None
            print(file=process.stdin, flush=True)
            return process.stdout.readline()

        assert has_received() == "False\n"
        for _ in ("notice", "echo"):
            process.send_signal(signal.SIGTERM)
            assert has_received() == "True\n"
        # The process must still run when the time for the launcher's echo is over.
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(SAME_NOTICE_SECONDS + 0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == EXIT_STATUS


def test_without_listen_sigterm_ends_the_process_as_usual() -> None:
    program = PROGRAM.replace("notice.listen()\n", "print('ready', flush=True)\n")
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPO / "sft",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
