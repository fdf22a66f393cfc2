"""What LoRA adapts by default, counted on models that have shapes and no values."""

import pytest
from peft import get_peft_model
from transformers import GptOssConfig
from trl import ModelConfig

from finetune.model.loading import meta_model
from finetune.model.lora import lora_config


@pytest.mark.parametrize(
    ("num_layers", "num_experts", "num_parameters"),
    [(24, 32, 92_454_912), (36, 128, 536_813_568)],
    ids=["20b", "120b"],
)
def test_lora_adapts_attention_and_both_projections_of_the_experts(
    num_layers: int, num_experts: int, num_parameters: int
) -> None:
    """The sizes are those of the published configs; the default config has the other ones."""
    config = GptOssConfig(num_hidden_layers=num_layers, num_local_experts=num_experts)
    model = meta_model(config)
    flags = ModelConfig(use_peft=True, lora_r=8, lora_dropout=0.0)
    adapted = get_peft_model(model, lora_config(model, flags), low_cpu_mem_usage=True)
    trained = {name: p.numel() for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == num_parameters
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", ".mlp.experts.")
    for name in trained:
        assert any(part in name for part in parts), name
    for part in parts:
        assert any(part in name for name in trained), part
