"""The model as loaded: MXFP4 unpacked exactly, experts found, packed conversations kept apart."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GptOssForCausalLM
from trl import ModelConfig

from errors import UserError
from model import choose_attention, expert_parameters, load_config, load_model, lora_config

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> GptOssForCausalLM:
    return load_model(str(tiny_model), attn_implementation="eager")


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


def test_experts_are_found_in_the_model(model: GptOssForCausalLM) -> None:
    names = expert_parameters(model)
    assert names == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    config = lora_config(model, ModelConfig(use_peft=True, lora_r=8, lora_dropout=0.0))
    assert config is not None and config.target_parameters == names
    with pytest.raises(UserError, match="no stacked expert weights"):
        expert_parameters(torch.nn.Linear(4, 4))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="is 'llama', not gpt_oss"):
        load_config(str(tmp_path))
    with pytest.raises(UserError, match="cannot be read"):
        load_config(str(tmp_path / "missing"))


def packed(lengths: list[int], *, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and the position_ids of conversations packed into one row, both (1, T)."""
    ids = torch.randint(0, 256, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return ids.to(device), positions.to(device)


def test_packed_conversations_do_not_see_each_other(model: GptOssForCausalLM) -> None:
    lengths = [50, 1, 90, 40]  # below and above the sliding window of 32, and one token alone
    ids, positions = packed(lengths)
    model = model.float()
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions).logits[0]
        alone = [model(input_ids=part).logits[0] for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_eager_attention_where_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert choose_attention() == "eager"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_attention_on_the_gpu_equals_eager(tiny_model: Path) -> None:
    ids, positions = packed([50, 1, 90, 40], device="cuda")
    results = []
    for attention in ("eager", choose_attention()):
        model = load_model(str(tiny_model), attn_implementation=attention).cuda()
        logits = model(input_ids=ids, position_ids=positions).logits.float()
        logits.square().mean().backward()
        sinks = [layer.self_attn.sinks.grad.float() for layer in model.model.layers]
        results.append((logits.detach(), torch.stack(sinks)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
