"""Tensors compared by the norm of their difference."""

import torch


def assert_same(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, tolerance: float
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].float() - value.float()).norm() / value.float().norm()
        assert error <= tolerance, f"{name}: {error:.1e}"
