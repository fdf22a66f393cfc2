"""Two launches of one run at the same time: the newer goes on, the older stops by itself."""

import json
from pathlib import Path

import psutil
import pytest

from finetune.checkpoint.manifest import check_complete
from helpers.launching import LORA, Launch, Start, await_event, finish

STEPS = 12
FLAGS = (*LORA, f"--max_steps={STEPS}", "--save_steps=1", "--save_total_limit=2")


def losses(run_dir: Path) -> list[float]:
    """The loss of every step, in full precision."""
    (file,) = run_dir.glob(f"checkpoint-{STEPS}*/trainer_state.json")
    state = json.loads(file.read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def sha256_of_files(artifact: Path) -> dict[str, str]:
    """As the summary has them: of all files that both launches of a run must write alike."""
    hashes: dict[str, str] = json.loads((artifact / "summary.json").read_text())["sha256"]
    return hashes


@pytest.mark.long  # tests/sky/test_two_mounts.py has two machines
def test_the_newer_of_two_launches_ends_like_a_run_alone_and_the_older_stops(
    launch: Launch, start: Start, tmp_path: Path
) -> None:
    """The older one stands still, like a machine out of reach, until the newer has begun."""
    run_dir, alone = tmp_path / "run", tmp_path / "alone"
    older = start(*FLAGS)
    await_event((run_dir / "checkpoint-2/manifest.json").exists, older)
    # Not the process group: each rank has one of its own.
    machine = [psutil.Process(older.pid), *psutil.Process(older.pid).children(recursive=True)]
    for process in machine:
        process.suspend()
    assert older.poll() is None
    newer = start(*FLAGS)
    await_event(lambda: len(list(run_dir.glob("writers/*.json"))) == 2, newer)
    assert newer.poll() is None, finish(newer)
    for process in machine:
        process.resume()
    stopped, finished = finish(older), finish(newer)

    said = stopped.stdout + stopped.stderr
    assert stopped.returncode == 0, said
    assert said.count("fenced off: a newer launch continues this run: number 2, host ") == 1, said
    assert "error" not in said and "test: finished" not in said

    assert finished.returncode == 0, finished.stderr
    assert "resuming from" in finished.stdout and "test: finished" in finished.stdout
    result = launch(*FLAGS, f"--output_dir={alone}")
    assert result.returncode == 0, result.stderr
    assert losses(run_dir) == losses(alone) and len(losses(alone)) == STEPS
    # All files, since the older launch of a run may upload its own late, over the newer one's.
    adapter, expected = (sha256_of_files(folder / "final") for folder in (run_dir, alone))
    assert "adapter_model.safetensors" in expected and adapter == expected
    kept = sorted(folder.name for folder in run_dir.glob("checkpoint-*"))
    assert kept == [f"checkpoint-{STEPS - 1}.0002", f"checkpoint-{STEPS}.0002"]
    assert all(check_complete(run_dir / name) is None for name in kept)
