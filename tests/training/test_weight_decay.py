"""Which parameters weight decay pulls towards zero."""

from pathlib import Path

from peft import get_peft_model
from trl import ModelConfig

from finetune.model.loading import load_config, meta_model
from finetune.model.lora import lora_config
from finetune.training.weight_decay import decayed


def test_matrices_are_decayed_and_nothing_else(tiny_model: Path) -> None:
    model = meta_model(load_config(str(tiny_model)))
    names = decayed(name for name, _ in model.named_parameters() if "layers.1." not in name)
    layer = "model.layers.0"
    assert sorted(names) == [
        "lm_head.weight",
        f"{layer}.mlp.experts.down_proj",
        f"{layer}.mlp.experts.gate_up_proj",
        *(f"{layer}.self_attn.{name}_proj.weight" for name in "koqv"),
    ]


def test_every_factor_of_lora_is_decayed_and_a_trained_router_is_not(tiny_model: Path) -> None:
    model = meta_model(load_config(str(tiny_model)))
    flags = ModelConfig(use_peft=True, lora_dropout=0.0, lora_modules_to_save=["router"])
    adapted = get_peft_model(model, lora_config(model, flags))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    factors = [name for name in trained if ".lora_" in name]
    assert decayed(trained) == factors
    assert len(factors) < len(trained)
