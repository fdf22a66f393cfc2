"""Real processes whose launcher is killed: they end, and so do their workers."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from helpers.paths import REPO

LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
rank.wait()
"""
RANK = """
import multiprocessing, os, signal, sys, time
from finetune.launcher import end_with_launcher, end_workers_with_parent
launcher = os.getppid()
end_with_launcher(is_saving=lambda: {is_saving})
end_workers_with_parent()
worker = multiprocessing.Process(target=time.sleep, args=[1000])
worker.start()
print("ready", flush=True)
{work}
"""
WAITS = "time.sleep(1000)"
SAVES = "while os.getppid() == launcher: time.sleep(0.01)\n"
SAVES += "time.sleep(1); print('saved', flush=True); os.kill(os.getpid(), signal.SIGKILL)"

RANK_ENVS = {"LOCAL_RANK": "0", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}

Kill = Callable[..., tuple[str, str]]


@pytest.fixture
def kill_launcher() -> Kill:
    """Kill the launcher of a rank; return what was printed once rank and worker have ended."""

    def kill(work: str, *, is_saving: bool = False, **envs: str) -> tuple[str, str]:
        rank = RANK.format(is_saving=is_saving, work=work)
        with subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, rank],
            cwd=REPO / "sft",
            env=os.environ | (envs or RANK_ENVS),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as launcher:
            assert launcher.stdout is not None
            assert launcher.stdout.readline() == "ready\n"
            launcher.send_signal(signal.SIGKILL)
            # Returns when the last process that holds the pipes has ended.
            return launcher.communicate(timeout=60)

    return kill


def test_a_rank_and_its_worker_end_with_their_launcher(kill_launcher: Kill) -> None:
    _, said = kill_launcher(WAITS)
    assert said.count("error: the launcher of this rank has ended, or was killed") == 1


def test_a_rank_that_saves_because_of_a_notice_may_do_so(kill_launcher: Kill) -> None:
    saved, said = kill_launcher(SAVES, is_saving=True)
    assert saved == "saved\n" and said == ""


def test_but_only_as_long_as_a_launcher_would_have_waited(kill_launcher: Kill) -> None:
    _, said = kill_launcher(
        WAITS, is_saving=True, LOCAL_RANK="0", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2"
    )
    assert "error: the launcher of this rank has ended" in said


def test_a_script_that_was_started_by_hand_outlives_its_shell(kill_launcher: Kill) -> None:
    assert kill_launcher(SAVES, OMP_NUM_THREADS="1") == ("saved\n", "")
