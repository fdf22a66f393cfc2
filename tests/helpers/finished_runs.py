"""What a LoRA run leaves behind, made without a run: an adapter of random numbers."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import GptOssForCausalLM, Mxfp4Config
from trl import ModelConfig

from finetune.checkpoint.fingerprint import model_revision
from finetune.export.base import open_base
from finetune.export.merge import MergedWeights, open_merged
from finetune.export.source import find_run_weights
from finetune.model.loading import load_config, meta_model
from finetune.model.lora import lora_config
from helpers.paths import CONVERSATIONS

RANK, ALPHA = 4, 32


def save_adapter_run(
    run_dir: Path, base: Path, *, std: float = 0.05, seed: int = 0, **flags: Any
) -> dict[str, Any]:
    """Write run_dir/final as train.py does, and return its fingerprint.

    std: of the numbers in lora_B; with 0 the adapter changes nothing. flags: TRL's, for LoRA.
    """
    model = meta_model(load_config(str(base)))
    defaults = {"lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0}
    args = ModelConfig(use_peft=True, **(defaults | flags))
    peft_model = get_peft_model(model, lora_config(model, args), low_cpu_mem_usage=True)
    generator = torch.Generator().manual_seed(seed)
    state_dict = {}
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            values = torch.randn(parameter.shape, generator=generator)
            state_dict[name] = values * (std if "lora_B" in name else 0.05)
    peft_model.peft_config["default"].base_model_name_or_path = str(base)
    peft_model.save_pretrained(
        run_dir / "final", state_dict=state_dict, save_embedding_layers=False
    )
    identity = {
        "model": str(base),
        "model_revision": model_revision(str(base), revision="main"),
        "dataset": str(CONVERSATIONS),
        "conversation_start_date": "2026-01-02",
        "test_split_size": 0.0,
        "seed": 0,
        "use_peft": True,
    } | {name: getattr(args, name) for name in ("lora_r", "lora_alpha", "use_rslora")}
    summary = {"steps": 4, "run": identity}
    (run_dir / "final/summary.json").write_text(json.dumps(summary))
    return identity


def with_other_weights(base: Path, folder: Path) -> Path:
    """A copy of a base model, folder/other, of which one weight is another."""
    other = shutil.copytree(base, folder / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    return other


def open_run(run_dir: Path) -> MergedWeights:
    """The merged weights of a run's final artifact or newest checkpoint."""
    run_weights = find_run_weights(run_dir)
    merged, _ = open_merged(run_weights, open_base(run_weights.record))
    return merged


def peft_model(base: Path, run_dir: Path) -> Any:
    """The run's adapter on its base, loaded by PEFT in fp32, as merge.py computes too."""
    model = GptOssForCausalLM.from_pretrained(
        base, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    return PeftModel.from_pretrained(model, run_dir / "final")
