"""Exports of a LoRA run that was not trained: what is kept, refused, resumed, pushed."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

import export as export_module
from export import ExportArguments, export
from finetune.checkpoint.manifest import manifest_entries, write_manifest
from finetune.errors import UserError
from finetune.export import fidelity as verify
from finetune.export import hub as push
from finetune.export import merge, shards
from helpers.finished_runs import save_adapter_run
from helpers.paths import REPO

TOKEN = "hf_" + "x" * 34


@pytest.fixture
def run_dir(tiny_model: Path, tmp_path: Path) -> Path:
    save_adapter_run(tmp_path / "run", tiny_model)
    return tmp_path / "run"


def arguments(form: Any, output: Path, **flags: Any) -> ExportArguments:
    return ExportArguments(format=form, output=output, **({"verify": False} | flags))


def test_an_untouched_base_comes_back_byte_for_byte(tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_model.iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    published = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    # Blocks that a quantiser would write otherwise: zeros, negative zeros, small values only.
    published[name][0, 0], published[name][0, 1] = 0, 0x88
    published[name][0, 2] &= 0x11
    save_file(published, base / "model.safetensors", metadata={"format": "pt"})
    save_adapter_run(tmp_path / "run", base, std=0.0)
    export(tmp_path / "run", arguments("mxfp4", tmp_path / "out"))
    files = list((tmp_path / "out").glob("*.safetensors"))
    ours = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert ours.keys() == published.keys()
    for name, tensor in published.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert ours[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name


@pytest.mark.parametrize("form", ["bf16", "mxfp4"])
def test_vanished_experts_are_seen_in_the_weights(
    form: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_experts(monkeypatch)
    with pytest.raises(UserError, match="mlp.experts.* has vanished in the export: 0.0%"):
        export(run_dir, arguments(form, tmp_path / "out", verify=True, num_examples=1))
    assert not json.loads((tmp_path / "out/export.json").read_text())["finished"]


def test_vanished_experts_are_seen_in_the_predictions(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_experts(monkeypatch)
    monkeypatch.setattr(verify, "experts_kept", lambda *_: 1.0)
    with pytest.raises(UserError, match="has lost what was trained: its KL divergence"):
        export(run_dir, arguments("bf16", tmp_path / "out", verify=True, num_examples=1))


def forget_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merge linear layers only, as tools do that know no stacked experts."""
    add = merge.add
    monkeypatch.setattr(merge, "add", lambda w, delta: w if w.ndim == 3 else add(w, delta))


def test_changes_smaller_than_mxfp4_resolves(tiny_model: Path, tmp_path: Path) -> None:
    """Lost to rounding, not to a mistake; bf16 keeps some of them."""
    save_adapter_run(tmp_path / "run", tiny_model, std=2e-4)
    flags = {"verify": True, "num_examples": 1}
    with pytest.raises(UserError, match="vanished.* take --format adapter"):
        export(tmp_path / "run", arguments("mxfp4", tmp_path / "out", **flags))


def small_shards(*args: Any, **flags: Any) -> None:
    shards.write_weights(*args, **flags, max_bytes=100_000)


def test_an_interrupted_export_goes_on(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    written: list[Path] = []
    monkeypatch.setattr(export_module, "write_weights", small_shards)

    def dies_at_the_third(tensors: Any, file: Path, **kwargs: Any) -> None:
        if len(written) == 2:
            file.write_bytes(b"half a file")
            raise KeyboardInterrupt
        save_file(tensors, file, **kwargs)
        written.append(file)

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(shards, "save_file", dies_at_the_third)
        export(run_dir, arguments("bf16", output))
    first, second = sorted(output.glob("*.safetensors"))
    assert not (output / shards.INDEX).exists()
    assert not json.loads((output / "export.json").read_text())["finished"]

    second.write_bytes(second.read_bytes()[:-1])  # as if the machine had died
    before = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    export(run_dir, arguments("bf16", output))
    assert first.stat().st_mtime_ns == before[0] and second.stat().st_mtime_ns > before[1]
    assert not list(output.glob(".*.part"))
    monkeypatch.undo()
    export(run_dir, arguments("bf16", tmp_path / "at-once"))
    at_once = load_file(tmp_path / "at-once/model-00001-of-00001.safetensors")
    index = json.loads((output / shards.INDEX).read_text())["weight_map"]
    assert index.keys() == at_once.keys() and len(set(index.values())) > 3
    for name, file in index.items():
        assert load_file(output / file)[name].equal(at_once[name])


def test_another_export_is_not_mixed_in(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(run_dir, arguments("adapter", output))
    with pytest.raises(UserError, match="holds an export as adapter of step 4"):
        export(run_dir, arguments("bf16", output))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds something else"):
        export(run_dir, arguments("bf16", tmp_path / "mine"))
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_damage_is_one_line_and_status_1(run_dir: Path, tmp_path: Path) -> None:
    file = run_dir / "final/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    command = [sys.executable, str(REPO / "sft/export.py"), str(run_dir), "--format", "bf16"]
    result = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if not line.startswith("[")]
    assert len(errors) == 1 and errors[0].startswith("error:") and "is not whole" in errors[0]
    assert not (tmp_path / "out").exists()


def test_what_is_not_whole_is_refused(
    run_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments("bf16", tmp_path / "out", verify=True)
    summary = run_dir / "final/summary.json"
    identity = json.loads(summary.read_text())["run"]
    summary.unlink()  # what train.py was still writing
    with pytest.raises(UserError, match="nothing in .* is whole: .*no checkpoint"):
        export(run_dir, args)
    folder = run_dir / "checkpoint-7"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"weights")
    with pytest.raises(UserError, match="checkpoint-7: it has no manifest.json"):
        export(run_dir, args)
    files = manifest_entries(folder, [folder / "__0_0.distcp"])
    write_manifest(folder, {"files": files, "fingerprint": identity})
    (folder / "__0_0.distcp").write_bytes(b"wEights")
    with pytest.raises(UserError, match="SHA-256 differs"):
        export(run_dir, args)
    with pytest.raises(UserError, match="no run in"):
        export(tmp_path / "nowhere", args)


def test_only_the_base_that_was_trained(run_dir: Path, tiny_model: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in tiny_model.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    export(run_dir, arguments("bf16", tmp_path / "out", model=str(moved)))
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (moved / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="is not the model that was trained"):
        export(run_dir, arguments("bf16", tmp_path / "other", model=str(moved)))
    (run_dir / "final/adapter_config.json").write_text(
        (run_dir / "final/adapter_config.json").read_text().replace('"mlp.experts.down_proj",', "")
    )
    with pytest.raises(UserError, match="does not fit"):
        export(run_dir, arguments("bf16", tmp_path / "other"))


def test_a_dataset_that_cannot_be_read(run_dir: Path, tmp_path: Path) -> None:
    summary = json.loads((run_dir / "final/summary.json").read_text())
    summary["run"]["dataset"] = "/gone.jsonl"
    (run_dir / "final/summary.json").write_text(json.dumps(summary))
    export(run_dir, arguments("adapter", tmp_path / "out", verify=True))
    record = json.loads((tmp_path / "out/export.json").read_text())
    assert "built-in" in record["text"] and record["fidelity"]["num_tokens"] > 20


class Hub:
    """What push.py asks of the hub."""

    calls: list[Any] = []
    role, offline = "write", False

    def __init__(self, token: str) -> None:
        assert token == TOKEN

    def whoami(self) -> dict[str, Any]:
        if self.offline:
            raise OfflineModeIsEnabled("offline")
        return {"name": "ada", "auth": {"accessToken": {"role": self.role}}, "orgs": []}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        self.calls.append(("create", repo_id, private))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, ignore_patterns: Any) -> None:
        self.calls.append(("upload", repo_id, sorted(file.name for file in folder_path.iterdir())))


def test_pushed_when_all_is_there(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(push, "HfApi", Hub)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    args = arguments("adapter", tmp_path / "out", push_to_hub="ada/mine")
    refusals: list[tuple[dict[str, Any], str]] = [
        ({}, "needs HF_TOKEN"),
        ({"offline": True}, "cannot be reached"),
        ({"role": "read"}, "may only read"),
    ]
    for attributes, message in refusals:
        with monkeypatch.context() as context, pytest.raises(UserError, match=message):
            for name, value in attributes.items():
                context.setenv("HF_TOKEN", TOKEN)
                context.setattr(Hub, name, value)
            export(run_dir, args)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for repo_id, message in (("bob/mine", "cannot write to 'bob'"), ("mine", "is not OWNER/NAME")):
        with pytest.raises(UserError, match=message):
            export(run_dir, arguments("adapter", tmp_path / "out", push_to_hub=repo_id))
    assert not (tmp_path / "out").exists() and not Hub.calls

    export(run_dir, args)
    (create, upload) = Hub.calls
    assert create == ("create", "ada/mine", True)
    assert {"adapter_model.safetensors", "README.md", "export.json"} <= set(upload[2])
    printed = capsys.readouterr()
    assert "https://hub/ada/mine" in printed.out and TOKEN not in printed.out + printed.err
    assert all(TOKEN not in file.read_text(errors="ignore") for file in args.output.iterdir())


def test_a_full_disk_is_said_before(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="GB of room, the export takes"):
        export(run_dir, arguments("bf16", tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.safetensors"))
