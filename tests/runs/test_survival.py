"""Real processes killed, stopped and robbed of their disk; what they leave is resumed exactly."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from finetune.checkpoint.manifest import check_complete, step_of
from helpers.launching import LORA, Launch, Start, await_event, finish
from rehearse import kill_node

FULL = ("fsdp2.yaml",)
# More than two epochs of a few conversations: a kill falls inside an epoch, between and behind.
STEPS = 48
EXACT = (f"--max_steps={STEPS}", "--save_steps=1", "--gradient_accumulation_steps=2")
ROUNDS = 10
KEY = "0" * 40


@pytest.fixture
def few_conversations(tmp_path: Path) -> str:
    lines = (Path(__file__).parent / "rehearsal/conversations.jsonl").read_text().splitlines()
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(lines[:45]))
    return f"--dataset_name={file}"


def newest_step(run_dir: Path) -> int:
    return max((step_of(folder) for folder in run_dir.glob("checkpoint-*")), default=0)


def has_begun_to_save(run_dir: Path, *, after: int) -> bool:
    return newest_step(run_dir) > after


def history(run_dir: Path) -> list[tuple[int, float]]:
    """Steps and losses in full precision."""
    state = json.loads((run_dir / f"checkpoint-{STEPS}/trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


def assert_same_run(run_dir: Path, unbroken: Path) -> None:
    """Every loss and every trained weight, bit for bit."""
    assert len(history(unbroken)) == STEPS
    assert history(run_dir) == history(unbroken)
    (file,) = (unbroken / "final").glob("*model.safetensors")
    expected, actual = load_file(file), load_file(run_dir / "final" / file.name)
    assert expected.keys() == actual.keys()
    assert all(expected[name].equal(actual[name]) for name in expected)


@pytest.mark.parametrize("recipe", [FULL, LORA], ids=["full", "lora"])
def test_killed_at_random_moments_equals_never_killed(
    recipe: tuple[str, ...], launch: Launch, start: Start, few_conversations: str, tmp_path: Path
) -> None:
    """Rank 0, rank 1, or all processes of the node, SIGKILLed while every step is saved."""
    run_dir, unbroken = tmp_path / "run", tmp_path / "unbroken"
    flags = (*recipe, *EXACT, few_conversations)
    result = launch(*flags, f"--output_dir={unbroken}")
    assert result.returncode == 0, result.stderr

    moment, output = random.Random(0), ""
    for number in range(ROUNDS):
        reached = newest_step(run_dir)
        # A rank whose peer died may wait for it in the background; the launcher ends that.
        launcher = start(*flags, "--save_total_limit=3", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1")
        await_event(partial(has_begun_to_save, run_dir, after=reached), launcher)
        if number:  # the first is killed as soon as its first save begins
            time.sleep(moment.uniform(0, 0.5))
        assert launcher.poll() is None, finish(launcher)
        ranks = sorted(psutil.Process(launcher.pid).children(), key=lambda rank: rank.pid)
        if number % 3 == 2:
            kill_node(launcher)
        else:
            ranks[number % 3].kill()
        result = finish(launcher)
        assert result.returncode != 0
        output += result.stdout
        psutil.wait_procs(ranks)

    result = launch(*flags)
    assert result.returncode == 0, result.stderr
    assert "is skipped: it has no manifest.json" in output + result.stdout
    assert_same_run(run_dir, unbroken)
    summary = json.loads((run_dir / "final/summary.json").read_text())
    assert 1 <= summary["interruptions"] <= ROUNDS
    assert summary["minutes_lost"] > 0 and summary["saving_percent"] > 0


def test_a_notice_saves_and_the_run_goes_on(
    launch: Launch, start: Start, few_conversations: str, tmp_path: Path
) -> None:
    """SIGTERM, as Slurm and a machine that shuts down send it; torch hands it on to the ranks."""
    flags = (*FULL, few_conversations, f"--max_steps={STEPS}", "--gradient_accumulation_steps=2")
    run_dir = tmp_path / "run"
    wandb = {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    launcher = start(*flags, "--save_steps=1000", SKYPILOT_TASK_ID="sky-1_first", **wandb)
    await_event(lambda: list(run_dir.glob("launches/*")), launcher)
    os.killpg(launcher.pid, signal.SIGTERM)
    result = finish(launcher)
    assert result.returncode != 0
    preempted = re.search(r"preempted, and saved at step (\d+) within [\d.]+ s", result.stdout)
    assert preempted, result.stdout + result.stderr
    assert check_complete(run_dir / f"checkpoint-{preempted[1]}") is None
    assert not (run_dir / "final").exists()

    assert KEY not in result.stdout + result.stderr
    result = launch(*flags, "--save_steps=1000", SKYPILOT_TASK_ID="second", **wandb)
    assert result.returncode == 0, result.stderr
    assert f"resuming from {run_dir}/checkpoint-{preempted[1]}" in result.stdout, result.stderr
    assert (
        len(list(tmp_path.glob("wandb/offline-run-*-sky-1_first"))) == 2
    )  # launches, of one run of W&B
    unbroken = launch(*flags, "--save_steps=1000", f"--output_dir={tmp_path / 'unbroken'}")
    assert unbroken.returncode == 0, unbroken.stderr
    assert_same_run(run_dir, tmp_path / "unbroken")


def test_a_rank_that_hangs_is_named(start: Start, tmp_path: Path) -> None:
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
    assert re.search(r"error: no progress for 8 s in step \d+: rank 1 \(host", result.stderr)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[list[str]]:
    """A mount namespace, as a command's prefix, in which tmp_path/run is a small disk's bind."""
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


def test_a_full_disk_leaves_the_last_whole_checkpoint(
    start: Start, node: list[str], tmp_path: Path
) -> None:
    disk, kept = str(tmp_path / "disk"), tmp_path / "kept"
    launcher = start(*FULL, "--max_steps=200", "--save_steps=1", prefix=node)
    await_event(lambda: exists(node, f"{disk}/checkpoint-3/manifest.json"), launcher)
    subprocess.run([*node, "fallocate", "-l", "2G", f"{disk}/filler"])
    subprocess.run([*node, "dd", "if=/dev/zero", f"of={disk}/filler", "bs=4k"])
    result = finish(launcher)
    assert result.returncode != 0
    assert "error: saving" in result.stderr and "No space left on device" in result.stderr
    subprocess.run([*node, "cp", "-r", disk, str(kept)], check=True)
    problems = {step_of(folder): check_complete(folder) for folder in kept.glob("checkpoint-*")}
    whole = max(step for step, problem in problems.items() if problem is None)
    assert whole >= max(problems) - 1
    assert f"the last whole checkpoint is checkpoint-{whole}" in result.stderr


def exists(node: list[str], path: str) -> bool:
    return subprocess.run([*node, "test", "-e", path]).returncode == 0


def test_a_bucket_that_goes_and_comes_back(
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
    shutil.rmtree(run_dir)  # what was written below the mount point is on nobody's bucket
    run_dir.mkdir()

    subprocess.run([*node, "mount", "--bind", str(disk), str(run_dir)], check=True)
    result = launch(*flags, prefix=node)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout


def test_other_numbers_of_processes(launch: Launch, tmp_path: Path) -> None:
    """Resharded from two ranks to one: the same batches, the same loss up to rounding."""
    flags = (*FULL, "--save_steps=3", "--max_steps=6")
    whole = launch(*flags)
    assert whole.returncode == 0, whole.stderr
    unbroken = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    shutil.rmtree(tmp_path / "run/final")

    refused = launch(*flags, num_processes=1)
    assert refused.returncode != 0
    assert "global_batch_size 2 -> 1" in refused.stderr

    resumed = launch(*flags, "--gradient_accumulation_steps=2", num_processes=1)
    assert resumed.returncode == 0, resumed.stderr
    state = json.loads((tmp_path / "run/checkpoint-6/trainer_state.json").read_text())
    for expected, actual in zip(unbroken["log_history"], state["log_history"], strict=True):
        if "loss" in expected:
            assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-3)
            assert actual["num_input_tokens_seen"] == expected["num_input_tokens_seen"]
