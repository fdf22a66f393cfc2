"""Runs whose processes are killed, stopped, or lose their disk, and what is resumed after that."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from finetune.checkpoint.manifest import check_complete, newest_checkpoint, step_of
from helpers.launching import (
    LONGEST_RUN,
    LORA,
    Launch,
    Start,
    await_event,
    defaults,
    finish,
    launch_command,
)
from helpers.paths import CONVERSATIONS, CPU_ENVS
from rehearse import kill_node

FULL = ("fsdp2.yaml",)
# More than two epochs of a few conversations: kills fall inside an epoch and between two.
STEPS = 32
EXACT = (f"--max_steps={STEPS}", "--gradient_accumulation_steps=2")
KILLED = ("rank 0", "rank 1", "all")
KEY = "0" * 40  # an API key of W&B's length; the runs are offline


@pytest.fixture(scope="module")
def few_conversations(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flag for a dataset of so few conversations that STEPS are more than two epochs."""
    lines = CONVERSATIONS.read_text().splitlines()
    file = tmp_path_factory.mktemp("data") / "few.jsonl"
    file.write_text("\n".join(lines[:30]))
    return f"--dataset_name={file}"


@pytest.fixture(scope="module")
def unbroken(
    tiny_model: Path, few_conversations: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The folder of a run of a recipe that nothing happened to."""

    @cache
    def run(config: str, *flags: str) -> Path:
        folder = tmp_path_factory.mktemp("unbroken")
        flags = (*defaults(tiny_model, folder), *flags, *EXACT, few_conversations)
        command = launch_command(config, *flags)
        subprocess.run(command, env=os.environ | CPU_ENVS, check=True, timeout=LONGEST_RUN)
        return folder / "run"

    return run


def newest_step(run_dir: Path) -> int:
    """The highest step that has a folder, complete or not."""
    return max((step_of(folder) for folder in run_dir.glob("checkpoint-*")), default=0)


def has_begun_to_save(run_dir: Path, *, after: int) -> bool:
    return newest_step(run_dir) > after


def history(run_dir: Path) -> list[tuple[int, float]]:
    """The step and the loss of every log entry, in full precision."""
    newest = newest_checkpoint(run_dir)
    assert newest is not None and step_of(newest) == STEPS
    state = json.loads((newest / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


def assert_same_run(run_dir: Path, unbroken: Path) -> None:
    """Every loss and every trained weight is equal, bit for bit."""
    assert len(history(unbroken)) == STEPS
    assert history(run_dir) == history(unbroken)
    (file,) = (unbroken / "final").glob("*model.safetensors")
    expected, actual = load_file(file), load_file(run_dir / "final" / file.name)
    assert expected.keys() == actual.keys()
    assert all(expected[name].equal(actual[name]) for name in expected)


@pytest.mark.long  # every rehearsal is killed once
@pytest.mark.parametrize("recipe", [FULL, LORA], ids=["full", "lora"])
def test_a_run_killed_at_random_moments_ends_like_one_never_killed(
    recipe: tuple[str, ...],
    launch: Launch,
    start: Start,
    few_conversations: str,
    unbroken: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """SIGKILL to rank 0, to rank 1, or to all processes, in a run that saves every step."""
    run_dir = tmp_path / "run"
    flags = (*recipe, *EXACT, "--save_steps=1", few_conversations)
    moment, output = random.Random(0), ""
    for number, process in enumerate(KILLED):
        reached = newest_step(run_dir)
        # A rank whose peer was killed may wait for it for a day, in a collective of the saver's.
        # The launcher ends that rank after this many seconds instead of its usual 30.
        launcher = start(*flags, "--save_total_limit=3", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
        await_event(partial(has_begun_to_save, run_dir, after=reached), launcher)
        # The first launch is killed as soon as its first save begins, the others at a random moment
        # after that. The sleep is the point here: it lets kills fall into every phase of a save.
        if number:
            time.sleep(moment.uniform(0, 0.5))
        assert launcher.poll() is None, finish(launcher)
        ranks = sorted(psutil.Process(launcher.pid).children(), key=lambda rank: rank.pid)
        if process == "all":
            kill_node(launcher)
        else:
            ranks[int(process[-1])].kill()
        result = finish(launcher)
        assert result.returncode != 0
        output += result.stdout
        psutil.wait_procs(ranks)

    result = launch(*flags)
    assert result.returncode == 0, result.stderr
    assert "is skipped: it has no manifest.json" in output + result.stdout
    assert_same_run(run_dir, unbroken(*recipe))
    summary = json.loads((run_dir / "final/summary.json").read_text())
    assert 1 <= summary["interruptions"] <= len(KILLED)
    assert summary["minutes_lost"] > 0 and summary["saving_percent"] > 0


def test_a_run_saves_at_sigterm_and_the_next_launch_continues_it(
    launch: Launch,
    start: Start,
    few_conversations: str,
    unbroken: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """SIGTERM to the process group, as Slurm sends it and a machine that shuts down."""
    flags = (*FULL, *EXACT, "--save_steps=1000", few_conversations, "--price_per_hour=36000")
    run_dir = tmp_path / "run"
    wandb = {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    launcher = start(*flags, SKYPILOT_TASK_ID="sky-1_first", **wandb)
    await_event(lambda: list(run_dir.glob("launches/*")), launcher)
    os.killpg(launcher.pid, signal.SIGTERM)
    result = finish(launcher)
    assert result.returncode != 0
    preempted = re.search(r"preempted, and saved at step (\d+) within [\d.]+ s", result.stdout)
    assert preempted, result.stdout + result.stderr
    assert check_complete(run_dir / f"checkpoint-{preempted[1]}") is None
    assert not (run_dir / "final").exists()

    assert KEY not in result.stdout + result.stderr
    result = launch(*flags, SKYPILOT_TASK_ID="second", **wandb)
    assert result.returncode == 0, result.stderr
    assert f"resuming from {run_dir}/checkpoint-{preempted[1]}" in result.stdout, result.stderr
    # Both launches belong to the W&B run of the first.
    records = sorted(tmp_path.glob("wandb/offline-run-*-sky-1_first/*.wandb"))
    told = [b"run/cost_while_training" in record.read_bytes() for record in records]
    assert told == [False, True]
    assert_same_run(run_dir, unbroken(*FULL))


def test_a_rank_that_hangs_is_named_and_the_run_ends(start: Start, tmp_path: Path) -> None:
    launcher = start(
        *FULL,
        "--max_steps=1000",
        "--ddp_timeout=10",
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1",
    )
    await_event(lambda: list(tmp_path.glob("run/launches/*")), launcher)
    ranks = sorted(psutil.Process(launcher.pid).children(), key=lambda rank: rank.pid)
    ranks[1].send_signal(signal.SIGSTOP)
    result = finish(launcher)
    assert result.returncode != 0
    pattern = r"error: no progress for 8 s in step \d+: rank 1 \(host .*\): process or node is not"
    assert re.search(pattern, result.stderr), result.stderr


@pytest.fixture
def node(tmp_path: Path) -> Iterator[list[str]]:
    """A mount namespace in which tmp_path/disk is a small disk that is also mounted at
    tmp_path/run; the prefix of commands that run inside it.
    """
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    holder = subprocess.Popen(["unshare", "--mount", "cat"], stdin=subprocess.PIPE)
    await_event(lambda: os.readlink(f"/proc/{holder.pid}/exe").endswith("cat"), holder)
    inside = ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt"]
    for folder in ("disk", "run"):
        (tmp_path / folder).mkdir()
    disk, run = str(tmp_path / "disk"), str(tmp_path / "run")
    subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "size=1100m", "tmpfs", disk], check=True)
    subprocess.run([*inside, "mount", "--bind", disk, run], check=True)
    yield inside
    holder.kill()
    holder.wait()


def test_a_full_disk_ends_the_run_and_keeps_the_last_complete_checkpoint(
    start: Start, node: list[str], tmp_path: Path
) -> None:
    disk, kept = str(tmp_path / "disk"), tmp_path / "kept"
    launcher = start(*FULL, "--max_steps=200", "--save_steps=1", prefix=node)
    await_event(lambda: exists(node, f"{disk}/checkpoint-3/manifest.json"), launcher)
    # fallocate takes nearly all that is free, dd the rest; both end with an error.
    subprocess.run([*node, "fallocate", "-l", "2G", f"{disk}/filler"])
    subprocess.run([*node, "dd", "if=/dev/zero", f"of={disk}/filler", "bs=4k"])
    result = finish(launcher)
    assert result.returncode != 0
    assert "error: saving" in result.stderr and "No space left on device" in result.stderr
    subprocess.run([*node, "cp", "-r", disk, str(kept)], check=True)
    problems = {step_of(folder): check_complete(folder) for folder in kept.glob("checkpoint-*")}
    complete = max(step for step, problem in problems.items() if problem is None)
    assert complete >= max(problems) - 1
    assert f"the last complete checkpoint is checkpoint-{complete}" in result.stderr


def exists(node: list[str], path: str) -> bool:
    """Whether the path exists inside the mount namespace."""
    return subprocess.run([*node, "test", "-e", path]).returncode == 0


@pytest.mark.long  # tests/checkpoint has the parts
def test_a_run_ends_when_its_bucket_is_unmounted_and_resumes_when_it_is_back(
    launch: Launch, start: Start, node: list[str], tmp_path: Path
) -> None:
    disk, run_dir = tmp_path / "disk", tmp_path / "run"
    flags = (*LORA, "--max_steps=24", "--save_steps=4", "--save_total_limit=2")
    launcher = start(*flags, prefix=node)
    await_event(lambda: exists(node, f"{disk}/checkpoint-4/manifest.json"), launcher)
    subprocess.run([*node, "umount", "--lazy", str(run_dir)], check=True)
    result = finish(launcher)
    assert result.returncode != 0
    assert "is no longer mounted: is the bucket gone?" in result.stderr, result.stderr
    shutil.rmtree(run_dir)  # it holds what was written to the node's disk after the unmount
    run_dir.mkdir()

    subprocess.run([*node, "mount", "--bind", str(disk), str(run_dir)], check=True)
    result = launch(*flags, prefix=node)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout


def test_a_run_is_resumed_on_another_number_of_processes(launch: Launch, tmp_path: Path) -> None:
    """From two ranks to one, with the same global batch: the same losses up to rounding."""
    flags = (*FULL, "--save_steps=3", "--max_steps=6")
    first = launch(*flags, "--global_batch_size=4")
    assert first.returncode == 0, first.stderr
    assert "global batch: 4 rows (1 a GPU, 2 times)" in first.stdout
    unbroken = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    shutil.rmtree(tmp_path / "run/final")

    refused = launch(*flags, num_processes=1)
    assert refused.returncode != 0
    assert "global_batch_size 4 -> 1" in refused.stderr

    resumed = launch(*flags, "--global_batch_size=4", num_processes=1)
    assert resumed.returncode == 0, resumed.stderr
    assert "global batch: 4 rows (1 a GPU, 4 times)" in resumed.stdout
    state = json.loads((tmp_path / "run/checkpoint-6.0002/trainer_state.json").read_text())
    for expected, actual in zip(unbroken["log_history"], state["log_history"], strict=True):
        if "loss" in expected:
            assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-3)
            assert actual["num_input_tokens_seen"] == expected["num_input_tokens_seen"]
