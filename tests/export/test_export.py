"""Real runs exported three ways, loaded from disk by transformers and PEFT, and compared."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssForCausalLM, Mxfp4Config

from export import ExportArguments, export
from finetune.model.mxfp4 import unpack
from finetune.model.quantize import quantize
from helpers.evaluations import EVALUATION
from helpers.launching import LORA, Launch, Start, await_event

FORMATS = ("adapter", "bf16", "mxfp4")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    return tensors


def export_as(form: Any, run_dir: Path, output: Path, **flags: Any) -> dict[str, Any]:
    """Export to output/form; what export.json says of it."""
    export(run_dir, ExportArguments(format=form, output=output / form, num_examples=2, **flags))
    return json.loads((output / form / "export.json").read_text())


def load(artifact: Path, base: Path) -> Any:
    """As a user does, and nothing missing or left over."""
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


def check_all_load(run_dir: Path, output: Path, base: Path, forms: tuple[str, ...]) -> None:
    """Each is closer to what train.py left than the base is, and generates."""
    inputs = prompt(output / forms[0])
    trained = log_probs(load(run_dir / "final", base), inputs)
    effect = kl(trained, log_probs(load(base, base), inputs))
    for form in forms:
        model = load(output / form, base)
        assert kl(trained, log_probs(model, inputs)) < 0.05 * effect, form
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert generated.shape[1] > inputs["input_ids"].shape[1]
        card = (output / form / "README.md").read_text()
        assert "license: apache-2.0" in card and "KL from the trained model" in card
        assert str(base.parent) not in card
        assert (output / form / "chat_template.jinja").exists()


def test_lora_three_ways(launch: Launch, tiny_model: Path, tmp_path: Path) -> None:
    result = launch(*LORA)
    assert result.returncode == 0, result.stderr
    run_dir = tmp_path / "run"
    (run_dir / "final/evaluation.json").write_text(json.dumps(EVALUATION))
    records = {form: export_as(form, run_dir, tmp_path) for form in FORMATS}
    check_all_load(run_dir, tmp_path, tiny_model, FORMATS)
    fidelity = {form: record["fidelity"] for form, record in records.items()}
    for form, measured in fidelity.items():
        assert measured["kl"] < 0.05 * measured["experts_effect_kl"], form
    assert fidelity["bf16"]["experts_kept"] > 0.99 > fidelity["mxfp4"]["experts_kept"] > 0.5
    assert fidelity["mxfp4"]["kl_bf16"] == fidelity["bf16"]["kl"] < fidelity["mxfp4"]["kl"]
    assert "re-quantisation costs" in records["mxfp4"]["hints"][0]

    card = (tmp_path / "bf16/README.md").read_text()
    assert "| overall | 1,234 | 2.0 -> 1.5 | 7.389 -> 4.4817 |" in card and "(loss.png)" in card
    assert not any(row["question"] in card for row in EVALUATION["generations"])
    plot = (run_dir / "final/loss.png").read_bytes()
    assert (tmp_path / "bf16/loss.png").read_bytes() == plot
    assert (tmp_path / "bf16/generation_config.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())
    published, ours = weights_of(tiny_model), weights_of(tmp_path / "mxfp4")
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in published.items()
    }
    configs = [
        json.loads((f / "config.json").read_text()) for f in (tiny_model, tmp_path / "mxfp4")
    ]
    assert configs[0] == configs[1]

    # A checkpoint holds the adapter and its optimizer's two states, in fp32, not the base.
    checkpoint = run_dir / "checkpoint-4"
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items()
    stored = {name: e for name, e in entries if isinstance(e, TensorStorageMetadata)}
    adapter = sum(
        t.numel() for t in load_file(run_dir / "final/adapter_model.safetensors").values()
    )
    assert all("lora_" in name for name in stored)
    counted = sum(entry.size.numel() for name, entry in stored.items() if name.startswith("model."))
    assert counted == adapter
    scalars = sum(name.endswith(".step") for name in stored)
    assert sum(entry.size.numel() for entry in stored.values()) == 3 * adapter + scalars

    # The last checkpoint holds what the artifact does.
    shutil.rmtree(run_dir / "final")
    record = export_as("adapter", run_dir, tmp_path / "again")
    assert record["origin"] == "checkpoint-4"
    files = [folder / "adapter" for folder in (tmp_path, tmp_path / "again")]
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in files]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(adapters[0][name].equal(adapters[1][name]) for name in adapters[0])
    written = [json.loads((folder / "adapter_config.json").read_text()) for folder in files]
    for config in written:
        config["target_modules"].sort()
    assert written[0] == written[1]


def test_full_two_ways(launch: Launch, tiny_model: Path, tmp_path: Path) -> None:
    result = launch("fsdp2.yaml")
    assert result.returncode == 0, result.stderr
    run_dir = tmp_path / "run"
    records = {form: export_as(form, run_dir, tmp_path) for form in ("bf16", "mxfp4")}
    check_all_load(run_dir, tmp_path, tiny_model, ("bf16", "mxfp4"))
    assert records["bf16"]["fidelity"]["kl"] == 0
    assert records["mxfp4"]["fidelity"]["kl"] > 0
    final, bf16, mxfp4 = (weights_of(d) for d in (run_dir / "final", *output_dirs(tmp_path)))
    assert final.keys() == bf16.keys()
    assert all(final[name].equal(bf16[name]) for name in final)
    name = "model.layers.1.mlp.experts.down_proj"
    expected = unpack(*quantize(final[name].transpose(1, 2)))
    assert unpack(mxfp4[f"{name}_blocks"], mxfp4[f"{name}_scales"]).equal(expected)

    shutil.rmtree(run_dir / "final")  # fp32, and over two ranks
    record = export_as("bf16", run_dir, tmp_path / "again", verify=False)
    assert record["origin"] == "checkpoint-4" and "fidelity" not in record
    again = weights_of(tmp_path / "again/bf16")
    assert final.keys() == again.keys()
    assert all(final[name].equal(again[name]) for name in final)


def output_dirs(folder: Path) -> list[Path]:
    return [folder / "bf16", folder / "mxfp4"]


def test_a_run_that_trains_on(start: Start, tmp_path: Path) -> None:
    """Its last whole checkpoint is exported, and it is left alone."""
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
