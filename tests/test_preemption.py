"""Real signals to a real process that listens for a notice of preemption."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from finetune.preemption import EXIT_STATUS, NOTHING_TO_SAVE
from helpers.paths import REPO

LISTENS = """
import sys
from finetune.preemption import PreemptionNotice
notice = PreemptionNotice()
notice.listen()
"""
HAS_WORK = """
notice.promise = "promised"
print("ready", flush=True)
for line in sys.stdin:
    print(notice.received, flush=True)
"""
# A mutex that is locked twice: the thread waits in C, and no signal interrupts that.
WAITS_IN_C = """
import ctypes
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
print("ready", flush=True)
libc.pthread_mutex_lock(mutex)
"""
HAS_WORKERS = """
import multiprocessing
notice.promise = "promised"
pool = multiprocessing.Pool(1)
pool.apply(int)
pool.terminate()
pool.join()
print("ready", notice.received, flush=True)
"""


@contextmanager
def running(program: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPO / "sft",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def ask(process: subprocess.Popen[str]) -> str:
    print(file=process.stdin, flush=True)
    return read(process)


def test_a_notice_is_kept_for_the_saver_and_further_ones_change_nothing() -> None:
    with running(LISTENS + HAS_WORK) as process:
        assert read(process) == "ready\n" and ask(process) == "False\n"
        process.send_signal(signal.SIGTERM)
        assert read(process) == "promised\n" and ask(process) == "True\n"
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
            assert ask(process) == "True\n"
        assert process.communicate()[0] == "" and process.returncode == 0


@pytest.mark.parametrize("rank", ["0", "1"])
def test_while_there_is_nothing_to_save_a_notice_ends_the_process_even_in_c(
    rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    with running(LISTENS + WAITS_IN_C) as process:
        assert read(process) == "ready\n"
        process.send_signal(signal.SIGTERM)
        said = f"{NOTHING_TO_SAVE}\n" if rank == "0" else ""  # one rank speaks for all
        assert process.communicate(timeout=60)[0] == said
        assert process.returncode == EXIT_STATUS


def test_a_pool_can_end_its_workers_and_that_is_no_notice() -> None:
    with running(LISTENS + HAS_WORKERS) as process:
        assert process.communicate(timeout=60)[0] == "ready False\n"


def test_without_listen_sigterm_ends_the_process_as_usual() -> None:
    with running("print('ready', flush=True); input()") as process:
        assert read(process) == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
