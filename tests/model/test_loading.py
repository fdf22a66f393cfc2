"""The model as it is loaded: MXFP4 unpacked exactly, experts found for LoRA, others refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GptOssForCausalLM
from trl import ModelConfig

from finetune.errors import UserError
from finetune.model.loading import load_config, load_model, load_tokenizer, save_tokenizer
from finetune.model.lora import expert_parameters, lora_config
from finetune.model.weights import BaseWeights

# Written out here, so that a mistake in the code's own table would show.
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> GptOssForCausalLM:
    return load_model(BaseWeights(str(tiny_model)), attn_implementation="eager")


def test_mxfp4_is_unpacked_exactly(model: GptOssForCausalLM, tiny_model: Path) -> None:
    stored = load_file(tiny_model / "model.safetensors")
    for name, parameter in model.named_parameters():
        if not name.endswith(("gate_up_proj", "down_proj")):
            continue
        blocks, scales = stored[f"{name}_blocks"], stored[f"{name}_scales"]
        values = FP4[torch.stack((blocks & 15, blocks >> 4), dim=-1).long()]  # (E, O, G, 16, 2)
        exponents = scales.float()[..., None, None] - 127
        weights = (values * 2**exponents).flatten(2).transpose(1, 2)
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter.float(), weights)


def test_lora_finds_the_experts_in_the_model(model: GptOssForCausalLM) -> None:
    names = expert_parameters(model)
    assert names == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    config = lora_config(model, ModelConfig(use_peft=True, lora_r=8, lora_dropout=0.0))
    assert config is not None and config.target_parameters == names
    with pytest.raises(UserError, match="no stacked expert weights"):
        expert_parameters(torch.nn.Linear(4, 4))


def test_a_saved_tokenizer_is_one_that_transformers_4_knows(
    tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    save_tokenizer(tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|start|>user<|message|>How do I cook rice?<|end|>"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.chat_template == tokenizer.chat_template
    assert (again.bos_token, again.eos_token, again.pad_token) == (
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer.pad_token,
    )


def test_a_model_that_is_missing_or_not_gpt_oss_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="is 'llama', not gpt_oss"):
        load_config(str(tmp_path))
    with pytest.raises(UserError, match="cannot be read"):
        load_config(str(tmp_path / "missing"))
