"""SIGTERM and SIGKILL to parts of a run: what is kept is said, and nothing goes on behind it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import psutil
import pytest
import yaml

from finetune.checkpoint.manifest import check_complete
from finetune.preemption import NOTHING_TO_SAVE
from finetune.task_file import TaskFile
from helpers import metadata_server
from helpers.launching import LONGEST_RUN, LORA, Start, await_event, finish
from helpers.paths import CONVERSATIONS, CPU_ENVS, REPO
from rehearse import free_port, kill_node, map_mounts, mounts, node_envs

TASK = REPO / "gpt-oss-20b-lora.yaml"
ONE_PROCESS = {"SKYPILOT_NUM_GPUS_PER_NODE": "1", "PYTHONUNBUFFERED": "1"}
ENDED = "ended by SIGTERM: a new launch goes on from the newest complete checkpoint\n"
# SkyPilot appends its wait for uploads to the block, which begins and ends like this.
APPENDED = """
__skypilot_user_exit_code=$?
echo "uploads are awaited with status $__skypilot_user_exit_code"
exit $__skypilot_user_exit_code"""
# Half of the rows are held out.
EVALUATES = (
    "--eval_strategy=steps",
    "--eval_steps=2",
    "--test_split_size=0.5",
    "--per_device_eval_batch_size=1",
    "--packing=false",
)

StartTask = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_task(tiny_model: Path, tmp_path: Path) -> Iterator[StartTask]:
    """Start the recipe's run block as SkyPilot does: written to a file, by an interactive bash.

    prefix: a command that runs it, for example nsenter with its flags.
    """
    shells = []

    def run(*flags: str, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
        small = ("--use_cpu=true", "--max_length=256", "--truncate=true", "--max_steps=4", *flags)
        (envs,) = node_envs(
            TaskFile.read(TASK),
            tmp_path,
            dataset=str(CONVERSATIONS),
            model=tiny_model,
            flags=" ".join(small),
        )
        block = map_mounts(yaml.safe_load(TASK.read_text())["run"], mounts(tmp_path))
        script = tmp_path / "run.sh"
        script.write_text("#!/bin/bash\n" + block.replace("29500", str(free_port())) + APPENDED)
        shells.append(
            subprocess.Popen(
                [*prefix, "/bin/bash", "-i", str(script)],
                env=envs | CPU_ENVS | ONE_PROCESS | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return shells[-1]

    yield run
    for shell in shells:
        kill_node(shell)


def read_until(stream: IO[str] | None, pattern: str) -> str:
    """What a process printed, to the end of the first line that matches."""
    assert stream is not None
    lines = []
    for line in stream:
        lines.append(line)
        if re.search(pattern, line):
            break
    assert re.search(pattern, lines[-1]), "".join(lines)
    return "".join(lines)


@pytest.mark.parametrize(
    ("moment", "kept"),
    [
        ("Generating train split", NOTHING_TO_SAVE),  # in preflight
        ("step 0/4 · evaluating", "preempted before the first step: there is nothing to save"),
    ],
    ids=["preparing data", "evaluating the base model"],
)
def test_sigterm_to_the_shell_alone_reaches_what_runs(
    moment: str, kept: str, start_task: StartTask, tmp_path: Path
) -> None:
    shell = start_task(*EVALUATES)
    read_until(shell.stdout, moment)
    shell.terminate()
    said, _ = shell.communicate(timeout=LONGEST_RUN)
    assert shell.returncode == 143, said
    assert kept in said and said.endswith(ENDED + "uploads are awaited with status 143\n"), said
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_uploads_are_awaited_after_a_failure_too(start_task: StartTask) -> None:
    shell = start_task("--lerning_rate=1")
    said, _ = shell.communicate(timeout=LONGEST_RUN)
    assert shell.returncode == 1 and "there is no flag --lerning_rate" in said
    assert said.endswith("uploads are awaited with status 1\n"), said


@pytest.fixture
def aws_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What its firmware calls a machine of AWS, with AWS's metadata service at the real address;
    the prefix of commands that run on it. The service answers from tmp_path/metadata.
    """
    if os.geteuid() != 0:
        pytest.skip("a network of its own needs root")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # there is no other
    firmware = "/sys/class/dmi/id"
    make = f"""
    ip link set lo up
    ip addr add {metadata_server.HOST}/32 dev lo
    mount -t tmpfs tmpfs /sys/class
    mkdir -p {firmware}
    echo Amazon EC2 > {firmware}/sys_vendor
    exec {sys.executable} {metadata_server.__file__} AWS {tmp_path / "metadata"}
    """
    with subprocess.Popen(
        ["unshare", "--mount", "--net", "bash", "-ec", make], stdout=subprocess.PIPE, text=True
    ) as machine:
        read_until(machine.stdout, "listens")
        yield ["nsenter", f"--target={machine.pid}", "--mount", "--net"]
        machine.kill()


@pytest.mark.long
def test_a_notice_of_aws_alone_saves_and_ends_with_the_status_that_is_launched_again(
    start_task: StartTask, aws_machine: list[str], tmp_path: Path
) -> None:
    """Before it a recommendation to rebalance, after which training goes on."""
    many = ("--max_steps=10000", "--save_steps=10000", "--save_every_minutes=1000")
    shell = start_task(*many, prefix=aws_machine)
    read_until(shell.stdout, r"^step 1/")
    metadata_server.write_answer(
        tmp_path / "metadata", metadata_server.AWS_REBALANCE, '{"noticeTime": "T1"}'
    )
    read_until(shell.stdout, "^AWS may take this machine back: rebalance recommendation of T1; ")
    await_event(lambda: list(tmp_path.rglob("checkpoint-*/manifest.json")), shell)
    notice = '{"action": "terminate", "time": "2026-11-26T18:10:00Z"}'
    metadata_server.write_answer(tmp_path / "metadata", metadata_server.AWS_NOTICE, notice)
    said, _ = shell.communicate(timeout=LONGEST_RUN)
    assert shell.returncode == 143, said
    assert "AWS takes this machine back: terminate at 2026-11-26T18:10:00Z" in said, said
    assert said.endswith(ENDED + "uploads are awaited with status 143\n"), said
    (step,) = re.findall(r"preempted, and saved at step (\d+) within [\d.]+ s", said)
    kept = sorted(tmp_path.rglob("checkpoint-*"))
    assert len(kept) == 2 and all(check_complete(folder) is None for folder in kept)
    assert f"checkpoint-{step}" in {folder.name for folder in kept}


@pytest.mark.long  # tests/runs/test_survival.py has SIGTERM in training
def test_sigterm_twice_to_all_processes_in_an_evaluation_saves_its_step(
    start: Start, tmp_path: Path
) -> None:
    """The evaluation is given up after the same batch on both ranks. The workers of the data
    loaders get the signal too.
    """
    launcher = start(*LORA, *EVALUATES, "--dataloader_num_workers=1", "--save_steps=100")
    read_until(launcher.stdout, r"^step 2/\d+ · evaluating")
    tree = [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]
    assert len(tree) >= 5
    for _ in range(2):
        for process in tree:
            if process.is_running():
                process.terminate()
    result = finish(launcher)
    said = result.stdout + result.stderr
    assert "preempted: the evaluation at step 2 is given up, and not run again" in said
    assert re.search(r"preempted, and saved at step 2 within [\d.]+ s", said), said
    assert check_complete(tmp_path / "run/checkpoint-2") is None
    assert "killed by signal" not in said


def test_ranks_and_workers_end_when_their_launcher_is_killed(start: Start, tmp_path: Path) -> None:
    launcher = start(*LORA, "--dataloader_num_workers=1", "--max_steps=1000", "--save_steps=1")
    await_event(lambda: list(tmp_path.glob("run/checkpoint-*/manifest.json")), launcher)
    processes = psutil.Process(launcher.pid).children(recursive=True)
    assert len(processes) >= 4
    launcher.kill()
    _, alive = psutil.wait_procs(processes, timeout=120)
    alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    assert not alive
    said = finish(launcher).stderr
    assert said.count("error: the launcher of this rank has ended, or was killed") == 1, said
    assert not (tmp_path / "run/final").exists()


def test_sigterm_during_the_final_save_lets_the_result_be_written(
    start: Start, tmp_path: Path
) -> None:
    launcher = start(*LORA, "--max_steps=1", num_processes=1)
    await_event((tmp_path / "run/final").exists, launcher)
    os.killpg(launcher.pid, signal.SIGTERM)
    result = finish(launcher)
    assert "SIGTERM: the last step is saved; the result is still written" in result.stdout
    assert "test: finished" in result.stdout
    assert (tmp_path / "run/final/summary.json").exists()
