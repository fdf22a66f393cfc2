"""The products of bf16 matrices that rehearsals take: those of fp32, rounded once."""

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from helpers.paths import REPO


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels of this process are replaced, until the test ends."""
    monkeypatch.syspath_prepend(REPO / "tests/rehearsal/cpu")
    module = importlib.import_module("bf16_matmul")
    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in module.PRODUCTS:
            module.replace_kernel(library, name)
        yield


def matrices(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = ((3, 40, 50), (3, 50, 60), (60,))
    return [torch.randn(*size).to(dtype).requires_grad_() for size in sizes]


def products(a: Tensor, b: Tensor, bias: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out = torch.mm(a[1], b[1], out=torch.empty(40, 60, dtype=a.dtype))
        batched_out = torch.bmm(a, b, out=torch.empty(3, 40, 60, dtype=a.dtype))
        in_place = torch.ones(40, 60, dtype=a.dtype).addmm_(a[2], b[2], beta=0.5)
    linear = torch.nn.functional.linear(a[0], b[0].T, bias)
    scaled = torch.addmm(bias, a[0], b[0], beta=0.5, alpha=2)
    return [a[0] @ b[0], a @ b, linear, scaled, out, batched_out, in_place]


@pytest.mark.usefixtures("replaced")
def test_bf16_is_fp32_rounded_once() -> None:
    factors = matrices(torch.bfloat16)
    in_fp32 = [factor.detach().float().requires_grad_() for factor in factors]
    for got, expected in zip(products(*factors), products(*in_fp32), strict=True):
        assert got.dtype is torch.bfloat16
        assert torch.equal(got, expected.bfloat16())


@pytest.mark.usefixtures("replaced")
def test_gradients_of_bf16_are_those_of_fp32_rounded_once() -> None:
    factors = matrices(torch.bfloat16)
    in_fp32 = [factor.detach().float().requires_grad_() for factor in factors]
    for a, b, _ in (factors, in_fp32):
        (a[0] @ b[0]).backward(torch.ones(40, 60, dtype=a.dtype))
    for got, expected in zip(factors[:2], in_fp32[:2], strict=True):
        assert got.grad is not None and expected.grad is not None
        assert torch.equal(got.grad, expected.grad.bfloat16())


@pytest.mark.usefixtures("replaced")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_keep_torch_s_kernels(dtype: torch.dtype) -> None:
    a, b, bias = matrices(dtype)
    got = products(a, b, bias)
    for ours, expected in zip(
        got[:2], (a[0].double() @ b[0].double(), a.double() @ b.double()), strict=True
    ):
        assert ours.dtype is dtype
        torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-4)
