"""sft/export.py: whole exports, of real runs and of one that was made without training."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssForCausalLM, Mxfp4Config

from export import ExportArguments, export
from finetune.errors import UserError
from finetune.export.record import Format
from finetune.export.shards import INDEX
from finetune.export.source import ADAPTER
from finetune.model.mxfp4 import unpack
from finetune.model.quantize import quantize
from helpers.cards import run_python_of_card
from helpers.engines import PROPERTY, rows_of_run
from helpers.evaluations import EVALUATION
from helpers.finished_runs import save_adapter_run, with_other_weights
from helpers.hub import COMMIT, TOKEN, FakeHub, put_in_cache
from helpers.launching import LORA, Launch, Start, await_event, losses
from helpers.paths import CPU_ENVS, REPO
from helpers.tensors import load_shards

FORMATS: tuple[Format, ...] = ("adapter", "bf16", "mxfp4")


def unverified(form: Any, output: Path, **flags: Any) -> ExportArguments:
    return ExportArguments(format=form, output=output, verify=False, **flags)


def read_json(file: Path) -> Any:
    return json.loads(file.read_text())


def test_an_interrupted_export_goes_on_when_it_is_repeated(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    args = unverified("bf16", output)
    export(run_dir, args, max_shard_bytes=100_000)
    complete = load_shards(output)
    first, *_, last = sorted(output.glob("*.safetensors"))
    written = first.stat().st_mtime_ns
    # What an interrupted call leaves: not all shards, no index, no card, an unfinished record.
    for file in (last, output / INDEX, output / "README.md"):
        file.unlink()
    record = read_json(output / "export.json") | {"finished": False}
    (output / "export.json").write_text(json.dumps(record))

    export(run_dir, args, max_shard_bytes=100_000)
    assert first.stat().st_mtime_ns == written and (output / "README.md").exists()
    assert read_json(output / "export.json")["finished"]
    again = load_shards(output)
    assert again.keys() == complete.keys() == read_json(output / INDEX)["weight_map"].keys()
    assert all(again[name].equal(complete[name]) for name in again)


def test_an_export_that_lost_what_was_trained_is_not_finished(
    tiny_model: Path, tmp_path: Path
) -> None:
    save_adapter_run(tmp_path / "run", tiny_model, std=2e-4)  # less than MXFP4 resolves
    args = ExportArguments(format="mxfp4", output=tmp_path / "out", num_examples=1)
    with pytest.raises(UserError, match="vanished.* take --format adapter"):
        export(tmp_path / "run", args)
    assert not read_json(tmp_path / "out/export.json")["finished"]
    assert not (tmp_path / "out/README.md").exists()


def test_a_folder_with_something_else_is_left_alone(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export(run_dir, unverified("adapter", output))
    with pytest.raises(UserError, match="holds an export as adapter of step 4"):
        export(run_dir, unverified("bf16", output))
    assert not list(output.glob("model*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds something else"):
        export(run_dir, unverified("bf16", tmp_path / "mine"))
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_what_cannot_be_a_folder_is_refused_in_one_line(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("file", "file/out", "loop", 300 * "n"):
        with pytest.raises(UserError, match="--output .* cannot be a folder"):
            export(run_dir, unverified("adapter", tmp_path / name))
    assert (tmp_path / "file").read_text() == "keep"


def test_an_export_is_not_mixed_with_that_of_a_run_trained_again(
    run_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    export(run_dir, unverified("gguf", output))
    before = (output / "model.gguf").read_bytes()
    save_adapter_run(run_dir, tiny_model, seed=1)
    with pytest.raises(UserError, match="of another run: give another --output"):
        export(run_dir, unverified("gguf", output))
    assert (output / "model.gguf").read_bytes() == before


def test_an_export_is_not_mixed_with_that_of_another_base(
    run_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run names a commit of the hub, with which a folder cannot be compared."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    put_in_cache(tiny_model, tmp_path / "cache", "ada/tiny")
    summary = read_json(run_dir / "final/summary.json")
    summary["run"] |= {"model": "ada/tiny", "model_revision": COMMIT}
    (run_dir / "final/summary.json").write_text(json.dumps(summary))
    output, copy = tmp_path / "out", shutil.copytree(tiny_model, tmp_path / "copy")
    export(run_dir, unverified("bf16", output))
    (output / "model-00001-of-00001.safetensors").unlink()
    other = with_other_weights(tiny_model, tmp_path)
    with pytest.raises(UserError, match="with another base model: repeat it with the --model of"):
        export(run_dir, unverified("bf16", output, model=str(other)))
    assert not list(output.glob("*.safetensors"))
    export(run_dir, unverified("bf16", output, model=str(copy)))
    assert list(output.glob("*.safetensors"))


@pytest.mark.slow
def test_a_damaged_run_is_one_line_and_status_1(run_dir: Path, tmp_path: Path) -> None:
    file = run_dir / "final" / ADAPTER
    file.write_bytes(file.read_bytes()[:-100])
    command = [sys.executable, str(REPO / "sft/export.py"), str(run_dir), "--format=bf16"]
    command.append(f"--output={tmp_path / 'out'}")
    envs = os.environ | CPU_ENVS
    result = subprocess.run(command, env=envs, capture_output=True, text=True)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if not line.startswith("[")]
    assert len(errors) == 1 and errors[0].startswith("error:") and "is not complete" in errors[0]
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_if_the_hub_would_refuse_it(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub = FakeHub(role="read")
    args = unverified("adapter", tmp_path / "out", push_to_hub="ada/mine")
    with pytest.raises(UserError, match="may only read"):
        export(run_dir, args, connect=hub.connect)
    assert not (tmp_path / "out").exists() and not hub.calls


def test_a_finished_export_is_uploaded_and_the_token_kept_secret(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub = FakeHub()
    args = unverified("adapter", tmp_path / "out", push_to_hub="ada/mine")
    export(run_dir, args, connect=hub.connect)
    create, upload = hub.calls
    assert create == ("create", "ada/mine", True)
    assert {ADAPTER, "README.md", "export.json"} <= set(upload[2])
    printed = capsys.readouterr()
    assert "https://hub/ada/mine" in printed.out and TOKEN not in printed.out + printed.err
    assert all(TOKEN not in file.read_text(errors="ignore") for file in args.output.iterdir())


def export_as(form: Any, run_dir: Path, output: Path, **flags: Any) -> dict[str, Any]:
    """Export to output/form and return what export.json holds."""
    export(run_dir, ExportArguments(format=form, output=output / form, num_examples=2, **flags))
    return read_json(output / form / "export.json")


def load(artifact: Path, base: Path) -> Any:
    """Load an artifact as a user does; no weight may be missing or left over."""
    is_adapter = (artifact / "adapter_config.json").exists()
    is_packed = is_adapter or "quantization_config" in (artifact / "config.json").read_text()
    model, report = AutoModelForCausalLM.from_pretrained(
        base if is_adapter else artifact,
        dtype=torch.bfloat16,
        quantization_config=Mxfp4Config(dequantize=True) if is_packed else None,
        output_loading_info=True,
    )
    assert isinstance(model, GptOssForCausalLM)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return PeftModel.from_pretrained(model, artifact) if is_adapter else model


def prompt(folder: Path) -> Any:
    messages = [{"role": "user", "content": "How do I cook rice?"}]
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


@torch.no_grad()
def log_probs(model: Any, inputs: Any) -> torch.Tensor:
    return model(**inputs).logits.float().log_softmax(-1)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


def check_all_load(run_dir: Path, output: Path, base: Path, forms: tuple[Format, ...]) -> None:
    """Each export is far closer to what train.py left than the base is, and generates."""
    inputs = prompt(output / forms[0])
    trained = log_probs(load(run_dir / "final", base), inputs)
    effect = kl(trained, log_probs(load(base, base), inputs))
    for form in forms:
        model = load(output / form, base)
        assert kl(trained, log_probs(model, inputs)) < 0.05 * effect, form
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert generated.shape[1] > inputs["input_ids"].shape[1]
        assert run_python_of_card(output / form, base=base)
        card = (output / form / "README.md").read_text()
        assert "license: apache-2.0" in card and "KL from the trained model" in card
        assert str(base.parent) not in card
        assert (output / form / "chat_template.jinja").exists()


def check_checkpoint_holds_only_the_adapter(run_dir: Path) -> None:
    """The adapter and its optimizer's two states, in fp32, and no weight of the base."""
    entries = FileSystemReader(run_dir / "checkpoint-4").read_metadata().state_dict_metadata.items()
    stored = {name: e for name, e in entries if isinstance(e, TensorStorageMetadata)}
    adapter = sum(t.numel() for t in load_file(run_dir / "final" / ADAPTER).values())
    assert all("lora_" in name for name in stored)
    counted = sum(entry.size.numel() for name, entry in stored.items() if name.startswith("model."))
    assert counted == adapter
    scalars = sum(name.endswith(".step") for name in stored)
    assert sum(entry.size.numel() for entry in stored.values()) == 3 * adapter + scalars


def test_a_lora_run_is_exported_in_every_format(
    launch: Launch, tiny_model: Path, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    result = launch(*LORA)
    assert result.returncode == 0, result.stderr
    run_dir = tmp_path / "run"
    (run_dir / "final/evaluation.json").write_text(json.dumps(EVALUATION))
    records = {form: export_as(form, run_dir, tmp_path) for form in FORMATS}
    check_all_load(run_dir, tmp_path, tiny_model, FORMATS)
    # transformers does not run GGUF; tests/export/test_gguf.py does so in llama.cpp.
    records |= {form: export_as(form, run_dir, tmp_path) for form in ("gguf", "gguf-adapter")}
    assert "FROM ./model.gguf" in (tmp_path / "gguf/Modelfile").read_text()
    assert "llama-server" in (tmp_path / "gguf-adapter/README.md").read_text()
    fidelity = {form: record["fidelity"] for form, record in records.items()}
    for form, measured in fidelity.items():
        assert measured["kl"] < 0.05 * measured["experts_effect_kl"], form
    assert fidelity["bf16"]["experts_kept"] > 0.99 > fidelity["mxfp4"]["experts_kept"] > 0.5
    assert fidelity["mxfp4"]["kl_bf16"] == fidelity["bf16"]["kl"] < fidelity["mxfp4"]["kl"]
    assert fidelity["gguf"] == pytest.approx(fidelity["mxfp4"])  # the same weights
    assert fidelity["gguf-adapter"] == pytest.approx(fidelity["bf16"], rel=1e-3)
    assert "re-quantisation costs" in records["mxfp4"]["hints"][0]
    all_forms: tuple[Format, ...] = (*FORMATS, "gguf", "gguf-adapter")
    record_property(PROPERTY, rows_of_run("LoRA", run_dir, tmp_path, all_forms))

    # A run of its own may go on from what this one learnt. Its first rows are the same here, and so
    # from the base it would have the same first loss.
    more = launch(
        *LORA,
        f"--model_name_or_path={tmp_path / 'mxfp4'}",
        f"--output_dir={tmp_path / 'more'}",
        "--max_steps=1",
    )
    assert more.returncode == 0, more.stderr
    assert losses(more.stdout)[0] != losses(result.stdout)[0]

    card = (tmp_path / "bf16/README.md").read_text()
    assert "| overall | 1,234 | 2.0 -> 1.5 | 7.389 -> 4.4817 |" in card and "(loss.png)" in card
    plot = (run_dir / "final/loss.png").read_bytes()
    assert (tmp_path / "bf16/loss.png").read_bytes() == plot
    assert (tmp_path / "bf16/generation_config.json").exists()
    assert "quantization_config" not in read_json(tmp_path / "bf16/config.json")
    published, ours = load_shards(tiny_model), load_shards(tmp_path / "mxfp4")
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in published.items()
    }
    assert read_json(tmp_path / "mxfp4/config.json") == read_json(tiny_model / "config.json")

    check_checkpoint_holds_only_the_adapter(run_dir)
    # The last checkpoint gives the same adapter as the artifact, tensors and configuration.
    shutil.rmtree(run_dir / "final")
    record = export_as("adapter", run_dir, tmp_path / "again")
    assert record["origin"] == "checkpoint-4"
    folders = [tmp_path / "adapter", tmp_path / "again/adapter"]
    first, second = (load_file(folder / ADAPTER) for folder in folders)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    configs = [read_json(folder / "adapter_config.json") for folder in folders]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]


def test_a_full_run_is_exported_as_whole_weights(
    launch: Launch, tiny_model: Path, tmp_path: Path, record_property: Callable[..., None]
) -> None:
    result = launch("fsdp2.yaml")
    assert result.returncode == 0, result.stderr
    run_dir = tmp_path / "run"
    records = {form: export_as(form, run_dir, tmp_path) for form in ("bf16", "mxfp4", "gguf")}
    assert records["gguf"]["fidelity"] == pytest.approx(records["mxfp4"]["fidelity"])
    with pytest.raises(UserError, match="has no adapter"):
        export_as("gguf-adapter", run_dir, tmp_path)
    check_all_load(run_dir, tmp_path, tiny_model, ("bf16", "mxfp4"))
    forms: tuple[Format, ...] = ("bf16", "mxfp4", "gguf")
    record_property(PROPERTY, rows_of_run("all weights", run_dir, tmp_path, forms))
    assert records["bf16"]["fidelity"]["kl"] == 0
    assert records["mxfp4"]["fidelity"]["kl"] > 0
    folders = (run_dir / "final", tmp_path / "bf16", tmp_path / "mxfp4")
    final, bf16, mxfp4 = map(load_shards, folders)
    assert final.keys() == bf16.keys()
    assert all(final[name].equal(bf16[name]) for name in final)
    name = "model.layers.1.mlp.experts.down_proj"
    expected = unpack(*quantize(final[name].transpose(1, 2)))
    assert unpack(mxfp4[f"{name}_blocks"], mxfp4[f"{name}_scales"]).equal(expected)

    # A run of its own may go on from what this one learnt. Its first rows are the same here.
    more = launch(
        "fsdp2.yaml",
        f"--model_name_or_path={run_dir / 'final'}",
        f"--output_dir={tmp_path / 'more'}",
        "--max_steps=1",
    )
    assert losses(more.stdout)[0] < losses(result.stdout)[0], more.stderr

    # The last checkpoint gives the same weights: it holds them in fp32, shared by two ranks.
    shutil.rmtree(run_dir / "final")
    record = export_as("bf16", run_dir, tmp_path / "again", verify=False)
    assert record["origin"] == "checkpoint-4" and "fidelity" not in record
    again = load_shards(tmp_path / "again/bf16")
    assert final.keys() == again.keys()
    assert all(final[name].equal(again[name]) for name in final)


@pytest.mark.long
def test_a_run_is_exported_while_it_trains_on(start: Start, tmp_path: Path) -> None:
    """Its newest complete checkpoint is exported, and the run goes on undisturbed."""
    run_dir = tmp_path / "run"
    torn = run_dir / "checkpoint-900"
    torn.mkdir(parents=True)
    (torn / "__0_0.distcp").write_bytes(b"torn")
    running = start(*LORA, "--max_steps=2000", "--save_steps=3", "--save_total_limit=100")
    await_event(lambda: list(run_dir.glob("checkpoint-*/manifest.json")), running)
    record = export_as("adapter", run_dir, tmp_path)
    assert running.poll() is None, running.communicate()
    assert record["origin"].startswith("checkpoint-") and record["step"] < 900
    assert record["fidelity"]["kl"] < record["fidelity"]["effect_kl"]
    seen = len(list(run_dir.glob("checkpoint-*/manifest.json")))
    await_event(lambda: len(list(run_dir.glob("checkpoint-*/manifest.json"))) > seen, running)
    assert running.poll() is None, running.communicate()
