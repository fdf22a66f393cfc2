"""Experts in MXFP4 that are unpacked within the product compute what unpacked ones compute."""

import re
from typing import Any

import pytest
import torch
from transformers import GptOssConfig

from finetune.benchmark.synthetic import make_config
from finetune.model import fused_unpacking, mxfp4
from finetune.model.experts import TILE
from finetune.model.mxfp4 import PackedGroupedMM, unpack
from finetune.model.unpacking_probe import choose_unpacking, probe, products_of_layer
from helpers.interpreter import (
    DEVICE,
    ON_GPU,
    assert_passes_in_interpreter,
    runs_kernels,
    starts_interpreter,
)
from helpers.packed import IN, OUT, every_value, random_packed
from helpers.tensors import assert_same

CONFIG = GptOssConfig(
    num_local_experts=6, num_experts_per_tok=2, hidden_size=96, intermediate_size=160
)


@starts_interpreter
def test_what_runs_the_kernel_passes_in_tritons_interpreter() -> None:
    assert_passes_in_interpreter(__file__)


@runs_kernels
@pytest.mark.parametrize("transpose", [True, False])
def test_every_normal_value_is_unpacked_exactly(transpose: bool) -> None:
    """Times the unit matrix. Under a scale above 252 the largest values are infinite in bf16; under
    one below 2 the smallest are subnormal, for which the interpreter's cast writes 0."""
    blocks, scales = (tensor[:, 2:253].to(DEVICE) for tensor in every_value())
    weights = unpack(blocks, scales)[0]
    unit = torch.eye(weights.shape[1 if transpose else 0], dtype=torch.bfloat16, device=DEVICE)
    offsets = torch.tensor([len(unit)], dtype=torch.int32, device=DEVICE)
    y = fused_unpacking.packed_grouped_mm(unit, blocks, scales, offsets, transpose=transpose)
    assert torch.equal(y, weights.T if transpose else weights)


@runs_kernels
@pytest.mark.parametrize(
    "counts", [(3, 0, 7, 1, 2), (0, 0, 0, 0, 9), (1, 0, 0, 0, 0), (130, 0, 256, 1, 129)]
)
def test_outputs_and_gradients_are_those_of_unpacked_experts(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts without rows, with a few, and with more than a program takes at once."""
    blocks, scales = (tensor.to(DEVICE) for tensor in random_packed())
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    generator = torch.Generator().manual_seed(1)
    x, grad = (
        torch.randn(sum(counts), size, generator=generator).bfloat16().to(DEVICE)
        for size in (IN, OUT)
    )
    monkeypatch.setattr(mxfp4, "unpacks_in_product", True)
    leaf = x.clone().requires_grad_()
    y = PackedGroupedMM.apply(leaf, blocks, scales, offsets)
    y.backward(grad)
    assert leaf.grad is not None

    dense = unpack(blocks, scales).float()
    expected = torch.empty(len(x), OUT, device=DEVICE)
    expected_grad = torch.empty(len(x), IN, device=DEVICE)
    ends = torch.tensor(counts).cumsum(0).tolist()
    for expert, (count, end) in enumerate(zip(counts, ends, strict=True)):
        rows = slice(end - count, end)
        expected[rows] = x[rows].float() @ dense[expert].T
        expected_grad[rows] = grad[rows].float() @ dense[expert]
    # bf16 has 8 bits of precision, and the interpreter cuts off the others where a GPU rounds.
    named = {"y": y, "the gradient of x": leaf.grad}
    assert_same(named, {"y": expected, "the gradient of x": expected_grad}, tolerance=5e-3)


@runs_kernels
@pytest.mark.parametrize("num_tokens", [1, 300])
def test_the_probe_trusts_a_kernel_that_is_right(num_tokens: int) -> None:
    products = products_of_layer(CONFIG, num_tokens=num_tokens, device=DEVICE)
    assert [(len(p.x), p.times) for p in products] == [(2 * num_tokens, n) for n in (2, 1, 1, 1)]
    assert probe(products) is None
    assert not mxfp4.unpacks_in_product


def test_products_are_timed_in_the_shapes_of_a_tile() -> None:
    """A row of 262,144 tokens would not fit a card in one product, and is never computed in one."""
    products = products_of_layer(CONFIG, num_tokens=TILE + 1, device="cpu")
    assert {len(product.x) for product in products} == {2 * TILE}


@pytest.mark.parametrize("wrong", ["a row", "nan", "it raises"])
def test_the_probe_refuses_a_wrong_kernel_with_the_reason(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def packed_grouped_mm(*args: Any, transpose: bool) -> torch.Tensor:
        if wrong == "it raises":
            raise RuntimeError("no kernel image\nis available")
        y = mxfp4.packed_grouped_mm(*args, transpose=transpose)
        y[-1] *= float("nan") if wrong == "nan" else 2
        return y

    monkeypatch.setattr(fused_unpacking, "packed_grouped_mm", packed_grouped_mm)
    refusal = probe(products_of_layer(CONFIG, num_tokens=40, device="cpu"))
    expected = {
        "a row": r"gate_up differs by \d+\.\d%",
        "nan": "gate_up differs by nan%",
        "it raises": "RuntimeError: no kernel image",
    }
    assert refusal is not None and re.fullmatch(expected[wrong], refusal)
    assert not mxfp4.unpacks_in_product


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("size, num_tokens", [("20b", 16_384), ("120b", 4_096)])
def test_the_kernel_is_right_in_the_recipes_shapes_on_this_gpu(
    size: str, num_tokens: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """And how long it takes, beside unpacking before the product."""
    choose_unpacking(make_config(size), num_tokens=num_tokens)
    mxfp4.unpacks_in_product = False
    line = capsys.readouterr().out
    print(f"{size}: {line}")
    assert re.search(r"ms a layer before the product, .* ms within it", line)
