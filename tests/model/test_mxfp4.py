"""Experts that stay in MXFP4 are the bf16 ones, bit for bit, in a quarter of their memory."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from peft import PeftModel, get_peft_model
from transformers import GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from trl import ModelConfig

from finetune.model import kernels as mxfp4_triton
from finetune.model import mxfp4
from finetune.model.experts import use_grouped_lora
from finetune.model.loading import load_model
from finetune.model.lora import lora_config
from finetune.model.mxfp4 import Mxfp4Weight, PackedGroupedMM, unpack
from finetune.model.weights import BaseWeights
from helpers.packed import IN, NUM_EXPERTS, OUT, every_value, random_packed
from helpers.paths import REPO


def test_unpacking_is_transformers_own() -> None:
    expected = convert_moe_packed_tensors(*every_value())
    assert torch.equal(unpack(*every_value()).transpose(1, 2), expected)


def test_the_kernel_unpacks_the_same() -> None:
    """Run by Triton's interpreter where there is no GPU."""
    code = """
import torch, mxfp4, mxfp4_triton, test_mxfp4
device = "cuda" if torch.cuda.is_available() else "cpu"
for blocks, scales in (test_mxfp4.every_value(), test_mxfp4.random_packed()):
    actual = mxfp4_triton.unpack(blocks.to(device), scales.to(device)).cpu()
    expected = mxfp4.unpack(blocks, scales)
    assert torch.equal(actual, expected)
    assert torch.equal(actual.signbit(), expected.signbit())
"""
    paths = os.pathsep.join(str(REPO / folder) for folder in ("sft", "tests", "tests/rehearsal"))
    envs = {"PYTHONPATH": paths}
    if not torch.cuda.is_available():
        envs["TRITON_INTERPRET"] = "1"
    subprocess.run([sys.executable, "-c", code], env=os.environ | envs, check=True)


def test_the_kernel_is_compiled_for_hopper() -> None:
    """No GPU is needed for that. It moves 16 bytes at a time where what it moves lies together."""
    arguments = {"blocks": "*u8", "scales": "*u8", "weights": "*i16", "num_bytes": "i64"}
    source = triton.compiler.ASTSource(
        fn=mxfp4_triton.unpack_kernel,
        signature=arguments | {"BYTES": "constexpr"},
        constexprs={"BYTES": mxfp4_triton.BYTES},
        attrs={(index,): [["tt.divisibility", 16]] for index in range(4)},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    assert "st.global.v4.b32" in triton.compile(source, target=target).asm["ptx"]


@pytest.mark.parametrize("counts", [(3, 0, 7, 1, 2), (0, 0, 0, 0, 9), (1, 0, 0, 0, 0)])
@pytest.mark.parametrize("experts_at_a_time", [1, 2, 5])
def test_rows_meet_the_bf16_weights(
    counts: tuple[int, ...], experts_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, scales = random_packed()
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


def test_a_packed_weight_is_bf16_to_whoever_looks() -> None:
    blocks, scales = random_packed()
    weight = torch.nn.Parameter(Mxfp4Weight(blocks, scales), requires_grad=False)
    assert isinstance(weight, Mxfp4Weight) and weight.shape == (NUM_EXPERTS, IN, OUT)
    assert torch.equal(weight * 2, unpack(blocks, scales).transpose(1, 2) * 2)
    with pytest.raises(NotImplementedError, match="packed in MXFP4"):
        weight.data += 1


def adapted(tiny_model: Path, *, dequantize: bool) -> Any:
    """The tiny gpt-oss with LoRA that already does something."""
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
    """Logits, and the gradients of the adapter."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch())
    output.loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach()} | named


def test_a_step_is_that_of_the_unpacked_base(tiny_model: Path) -> None:
    expected = step(adapted(tiny_model, dequantize=True))
    model = adapted(tiny_model, dequantize=False)
    packed = [p for p in model.parameters() if isinstance(p, Mxfp4Weight)]
    assert len(packed) == 2 * model.config.num_hidden_layers
    actual = step(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


def test_what_is_unpacked_is_not_kept_for_backward(tiny_model: Path) -> None:
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


def test_an_adapter_is_loaded_for_evaluation(tiny_model: Path, tmp_path: Path) -> None:
    """Written beside a packed base in PEFT's own format, read beside either."""
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
