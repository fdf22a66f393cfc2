"""Tensors read from a folder, and compared by the norm of their difference, on CPU or GPU."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# A test's parameter beside "cpu".
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    ],
)


def load_shards(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's safetensors files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, tolerance: float
) -> None:
    """Fail if the relative error of any tensor is above the tolerance."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].float() - value.float()).norm() / value.float().norm()
        assert error <= tolerance, f"{name}: {error:.1e}"
