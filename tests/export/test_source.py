"""Which weights of a run are exported, and which are refused."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from finetune.checkpoint.manifest import manifest_entries, write_manifest
from finetune.errors import UserError
from finetune.export.source import ADAPTER, find_run_weights


@pytest.fixture
def unfinished_run(run_dir: Path) -> Path:
    """A run whose final artifact train.py was still writing: its summary.json is missing."""
    (run_dir / "final/summary.json").unlink()
    return run_dir


def save_checkpoint(run_dir: Path, step: int) -> Path:
    folder = run_dir / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"weights")
    return folder


def test_the_final_artifact_is_read(run_dir: Path) -> None:
    run_weights = find_run_weights(run_dir)
    assert (run_weights.origin, run_weights.step) == ("final", 4)
    assert run_weights.is_adapter and not run_weights.is_packed("anything")
    for name, shape in run_weights.shapes.items():
        assert run_weights.shape(name) == run_weights.rows(name).shape == shape
        assert run_weights.dense(name, start=1, stop=3).equal(run_weights.rows(name)[1:3])


def test_an_artifact_alone_is_read(run_dir: Path) -> None:
    assert find_run_weights(run_dir / "final").folder == run_dir / "final"


def test_a_file_that_is_cut_off_is_refused(run_dir: Path) -> None:
    file = run_dir / "final" / ADAPTER
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{ADAPTER} is not complete"):
        find_run_weights(run_dir)


def test_weights_of_a_diverged_run_are_refused(run_dir: Path) -> None:
    """Version 0.1.0 left such artifacts, without hashes."""
    file = run_dir / "final" / ADAPTER
    tensors = load_file(file)
    name = min(tensors)
    tensors[name][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} in .*final is not finite"):
        find_run_weights(run_dir).rows(name)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in"):
        find_run_weights(tmp_path / "nowhere")


def test_a_run_with_nothing_complete_is_refused(unfinished_run: Path) -> None:
    with pytest.raises(UserError, match="nothing in .* is complete: .*no checkpoint"):
        find_run_weights(unfinished_run)
    save_checkpoint(unfinished_run, 7)
    with pytest.raises(UserError, match="checkpoint-7: it has no manifest.json"):
        find_run_weights(unfinished_run)


def test_a_damaged_checkpoint_is_refused(run_dir: Path) -> None:
    summary = run_dir / "final/summary.json"
    identity = json.loads(summary.read_text())["run"]
    summary.unlink()
    folder = save_checkpoint(run_dir, 7)
    files = manifest_entries(folder, [folder / "__0_0.distcp"])
    write_manifest(folder, {"files": files, "fingerprint": identity})
    (folder / "__0_0.distcp").write_bytes(b"wEights")
    with pytest.raises(UserError, match="SHA-256 differs"):
        find_run_weights(run_dir)


def test_an_export_goes_on_with_the_checkpoint_that_it_began_with(unfinished_run: Path) -> None:
    with pytest.raises(UserError, match="checkpoint-3, which the run has deleted since"):
        find_run_weights(unfinished_run, origin="checkpoint-3")
