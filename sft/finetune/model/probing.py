"""What the probes share that compare a kernel with its definition before training."""

import torch


def failure_of(error: Exception) -> str:
    """One line for whatever a missing package or a kernel's compiler raises."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of their difference over that of expected, on any two devices; NaN if one has NaN.

    Compare it as `not difference <= tolerance`, which refuses NaN too.
    """
    expected = expected.float()
    return float((actual.float().to(expected.device) - expected).norm() / expected.norm())
