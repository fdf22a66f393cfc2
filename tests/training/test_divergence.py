"""Numbers that are not finite end the run, and the message names step, rank and tensor."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from finetune.errors import UserError
from finetune.training.divergence import LossWatch, check_step, check_tensors


def test_a_nan_in_any_batch_of_a_step_is_a_problem_of_that_step_only() -> None:
    watch = LossWatch()
    watch.add(torch.tensor(float("nan")))
    watch.add(torch.tensor(1.0))
    assert watch.problem(1.0) == "loss"
    watch.add(torch.tensor(1.0))
    assert watch.problem(torch.tensor(1.0)) is None
    assert watch.problem(torch.tensor(float("inf"))) == "gradient norm"


def test_a_rank_without_a_problem_stops_for_the_one_that_has_it() -> None:
    model = torch.nn.Linear(2, 2)
    answers: Iterator[list[Any]] = iter([[None, "loss"], [None, None]])
    with pytest.raises(UserError, match="at step 3, not finite: loss on rank 1; nothing"):
        check_step(3, None, model, gather=lambda _: next(answers))


def test_weights_that_were_not_finite_before_the_step_are_named() -> None:
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.bias, float("nan"))
    with pytest.raises(UserError, match="before this step: bias on rank 0"):
        check_step(1, "loss", model, gather=lambda value: [value])


def test_an_optimizer_state_that_is_not_finite_is_not_saved() -> None:
    state = {"model": {"w": torch.ones(2)}, "optimizer": {"w": {"exp_avg": torch.ones(2) / 0}}}
    with pytest.raises(UserError, match=r"optimizer\.w\.exp_avg on rank 0"):
        check_tensors(state, "the states after step 2", gather=lambda value: [value])
    check_tensors({"packed": torch.ones(2, dtype=torch.uint8)}, "x", gather=lambda value: [value])


def test_a_shard_of_zero3_is_looked_at_instead_of_its_empty_parameter() -> None:
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_tensor = torch.tensor([1.0, float("inf")])  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="w on rank 0"):
        check_tensors({"w": parameter}, "the weights", gather=lambda value: [value])
