"""--lora_modules_to_save on real processes: copies are trained in fp32, as LoRA's factors are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.model.weights import BaseWeights
from helpers.launching import Launch

COPIES = {
    "lm_head": "lm_head.weight",
    "embed_tokens": "model.embed_tokens.weight",
    "router": "model.layers.0.mlp.router.weight",
}
FLAGS = (
    "--use_peft=true",
    "--lora_r=4",
    "--lora_dropout=0",
    "--learning_rate=2e-5",
    "--lr_scheduler_type=constant",
    "--max_steps=1",
    "--lora_modules_to_save",
    *COPIES,
)


@pytest.mark.parametrize(
    "recipe",
    [
        ("ddp.yaml",),
        pytest.param(("fsdp2_lora.yaml", "--dequantize=true"), marks=pytest.mark.long),
    ],
    ids=["ddp", "fsdp2"],
)
def test_a_small_rate_moves_the_trained_copies(
    recipe: tuple[str, ...], launch: Launch, tmp_path: Path, tiny_model: Path
) -> None:
    """AdamW's first step moves every number that has a gradient by the learning rate. In bf16 a
    number of 0.02 does not move by 2e-5: half its last digit is more.
    """
    result = launch(recipe[0], *FLAGS, *recipe[1:])
    assert result.returncode == 0, result.stderr
    adapter = load_file(tmp_path / "run/final/adapter_model.safetensors")
    config = json.loads((tmp_path / "run/final/adapter_config.json").read_text())
    assert set(config["modules_to_save"]) == set(COPIES)
    base = BaseWeights(str(tiny_model))
    for stored in COPIES.values():
        trained = adapter[f"base_model.model.{stored}"]
        assert trained.dtype == torch.float32, stored
        moved = (trained - base.rows(stored).float()).abs()
        assert moved.max() < 3e-5
        touched = moved.flatten(1).amax(dim=1) > 0  # rows: tokens of the data, or experts
        assert touched.any(), stored
        assert (moved[touched] > 1e-5).float().mean() > 0.9, stored
