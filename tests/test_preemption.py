"""Real signals to a real process."""

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
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(SAME_NOTICE_SECONDS + 0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == EXIT_STATUS
