"""Experts that stay in MXFP4 compute what the bf16 ones do, and are never kept unpacked."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from trl import ModelConfig

from finetune.model import mxfp4
from finetune.model.experts import use_grouped_lora
from finetune.model.loading import load_model
from finetune.model.lora import lora_config
from finetune.model.mxfp4 import Mxfp4Weight, PackedGroupedMM, unpack
from finetune.model.weights import BaseWeights
from helpers.packed import IN, NUM_EXPERTS, OUT, every_value, random_packed
from helpers.paths import python_path


def test_every_value_is_unpacked_as_transformers_does() -> None:
    expected = convert_moe_packed_tensors(*every_value())
    assert torch.equal(unpack(*every_value()).transpose(1, 2), expected)


RUN_KERNEL = """
import torch
from finetune.model import kernels, mxfp4
from helpers.packed import every_value, random_packed

device = "cuda" if torch.cuda.is_available() else "cpu"
for blocks, scales in (every_value(), random_packed()):
    actual = kernels.unpack(blocks.to(device), scales.to(device)).cpu()
    expected = mxfp4.unpack(blocks, scales)
    assert torch.equal(actual, expected)
    assert torch.equal(actual.signbit(), expected.signbit())
"""


def test_the_kernel_unpacks_the_same() -> None:
    """Without a GPU Triton's interpreter runs it, which must be chosen before Triton's import."""
    envs = {"PYTHONPATH": python_path("sft", "tests")}
    if not torch.cuda.is_available():
        envs["TRITON_INTERPRET"] = "1"
    subprocess.run([sys.executable, "-c", RUN_KERNEL], env=os.environ | envs, check=True)


@pytest.mark.parametrize("counts", [(3, 0, 7, 1, 2), (0, 0, 0, 0, 9), (1, 0, 0, 0, 0)])
@pytest.mark.parametrize("experts_at_a_time", [1, 2, 5])
def test_packed_experts_multiply_as_bf16_ones(
    counts: tuple[int, ...], experts_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, scales = random_packed()
    # The module's own constant: an argument of PackedGroupedMM would be for this test alone.
    monkeypatch.setattr(mxfp4, "MAX_UNPACKED_BYTES", experts_at_a_time * OUT * IN * 2)
    offsets = torch.tensor(counts).cumsum(0).int()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), IN, generator=generator).bfloat16().requires_grad_()
    y = PackedGroupedMM.apply(x, blocks, scales, offsets)
    grad = torch.randn(y.shape, generator=generator).bfloat16()
    y.backward(grad)

    reference = x.detach().clone().requires_grad_()
    dense = unpack(blocks, scales).transpose(1, 2)
    expected = torch.nn.functional.grouped_mm(reference, dense, offs=offsets)
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x.grad, reference.grad)


def test_a_packed_weight_looks_like_bf16_and_cannot_be_changed() -> None:
    blocks, scales = random_packed()
    weight = torch.nn.Parameter(Mxfp4Weight(blocks, scales), requires_grad=False)
    assert isinstance(weight, Mxfp4Weight) and weight.shape == (NUM_EXPERTS, IN, OUT)
    assert torch.equal(weight * 2, unpack(blocks, scales).transpose(1, 2) * 2)
    with pytest.raises(NotImplementedError, match="packed in MXFP4"):
        weight.data += 1


def adapted(tiny_model: Path, *, dequantize: bool) -> Any:
    """The tiny gpt-oss with LoRA of random numbers."""
    model: Any = load_model(
        BaseWeights(str(tiny_model)), attn_implementation="eager", dequantize=dequantize
    )
    args = ModelConfig(use_peft=True, lora_r=8, lora_alpha=16, lora_dropout=0.0)
    model = get_peft_model(model, lora_config(model, args))
    use_grouped_lora(model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "labels": ids}


def step(model: Any) -> dict[str, torch.Tensor]:
    """The logits, and the gradients of the adapter."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch())
    output.loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach()} | named


def test_a_step_on_a_packed_base_equals_one_on_an_unpacked_base(tiny_model: Path) -> None:
    expected = step(adapted(tiny_model, dequantize=True))
    model = adapted(tiny_model, dequantize=False)
    packed = [p for p in model.parameters() if isinstance(p, Mxfp4Weight)]
    assert len(packed) == 2 * model.config.num_hidden_layers
    actual = step(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


def test_unpacked_weights_are_not_kept_for_backward(tiny_model: Path) -> None:
    model = adapted(tiny_model, dequantize=False)
    stack = model.config.num_local_experts * model.config.hidden_size
    stack *= model.config.intermediate_size
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.base_model.model.model.layers[0].mlp(torch.randn(1, 2, 64).bfloat16())
    assert kept and max(kept) < stack


def test_an_adapter_trained_on_a_packed_base_loads_on_either(
    tiny_model: Path, tmp_path: Path
) -> None:
    trained = adapted(tiny_model, dequantize=False)
    trained.save_pretrained(tmp_path)
    bases: list[GptOssForCausalLM] = [
        load_model(BaseWeights(str(tiny_model)), attn_implementation="eager", dequantize=dequantize)
        for dequantize in (False, True)
    ]
    with torch.no_grad():
        expected = trained.eval()(**batch()).logits
        for base in bases:
            model = PeftModel.from_pretrained(base, tmp_path).eval()
            use_grouped_lora(model)
            torch.testing.assert_close(model(**batch()).logits, expected)
