"""Stops a run whose numbers are no longer finite, on every rank and before anything is saved."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import Module

from finetune.errors import UserError

ADVICE = (
    "look at the data of this step, and try a lower --learning_rate or a longer warmup under "
    "another RUN_NAME"
)

Gather = Callable[[Any], list[Any]]  # the value of each rank, in their order, on all ranks


class Diverged(UserError):
    """Raised on all ranks at the same moment: a number is not finite on one of them."""


class LossWatch:
    """Sums the losses of one optimizer step on the device: one NaN or infinity makes the sum so."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None

    def add(self, loss: torch.Tensor) -> None:
        """Count the loss of one batch in, without waiting for the device."""
        loss = loss.detach().float()
        self.total = loss if self.total is None else self.total + loss

    def problem(self, grad_norm: torch.Tensor | float | None) -> str | None:
        """What is not finite on this rank, or None; begins the next step.

        This waits for the device, as the token count of every batch already does.
        """
        numbers = {"loss": self.total, "gradient norm": grad_norm}
        self.total = None
        found = [name for name, value in numbers.items() if value is not None and is_bad(value)]
        return " and ".join(found) or None


def is_bad(value: torch.Tensor | float) -> bool:
    """Whether a number, or a tensor's shard on this rank, holds a NaN or an infinity."""
    if isinstance(value, DTensor):
        value = value.to_local()
    value = getattr(value, "ds_tensor", value)  # under ZeRO-3 the parameter itself is empty
    return not bool(torch.as_tensor(value).isfinite().all())


def check_step(step: int, problem: str | None, model: Module, *, gather: Gather) -> None:
    """Raise Diverged on all ranks if one has a problem. Called by all ranks before the optimizer
    changes the weights.
    """
    problems = gather(problem)
    if not any(problems):
        return
    where = [f"{what} on rank {rank}" for rank, what in enumerate(problems) if what]
    weights = first_of(gather(bad_tensor(dict(model.named_parameters()))))
    cause = f"; the weights were not finite before this step: {weights}" if weights else ""
    raise Diverged(
        f"training diverged at step {step}, not finite: {', '.join(where)}{cause}; "
        f"nothing of this step is saved; {ADVICE}"
    )


def check_tensors(tensors: dict[str, Any], what: str, *, gather: Gather) -> None:
    """Raise Diverged on all ranks if a tensor of this nested dict is not finite on one of them.

    what: the words that begin the message, such as `the weights after step 4`.
    """
    name = first_of(gather(bad_tensor(tensors)))
    if name is not None:
        raise Diverged(f"{what} are not finite: {name}; nothing of them is saved; {ADVICE}")


def first_of(names: list[str | None]) -> str | None:
    """The first name that a rank reports, with the rank."""
    return next((f"{name} on rank {rank}" for rank, name in enumerate(names) if name), None)


def bad_tensor(tensors: dict[str, Any]) -> str | None:
    """The name of the first tensor whose shard on this rank is not finite, or None."""
    return next((name for name, tensor in floating(tensors) if is_bad(tensor)), None)


def floating(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The floating-point tensors of a nested dict, each with its dotted name."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from floating(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and not value.is_meta:
            yield f"{prefix}{key}", value
