"""The learning rate of each step."""

import pytest
import torch
from transformers import get_scheduler

from finetune.training.schedule import warm_up_from_first_increment


def rates(name: str, *, num_warmup_steps: int, resume_at: int | None = None) -> list[float]:
    """The learning rate of each of eight steps, whose highest is 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    def make() -> torch.optim.lr_scheduler.LRScheduler:
        scheduler = get_scheduler(
            name, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=8
        )
        return warm_up_from_first_increment(scheduler, num_warmup_steps=num_warmup_steps)

    scheduler, seen = make(), []
    for step in range(8):
        if step == resume_at:
            state, scheduler = scheduler.state_dict(), make()
            scheduler.load_state_dict(state)
            optimizer.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_warm_up_starts_at_its_first_increment_and_the_rest_stays() -> None:
    assert rates("linear", num_warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    assert rates("cosine", num_warmup_steps=1)[0] == 1


def test_a_schedule_without_warm_up_stays() -> None:
    assert rates("linear", num_warmup_steps=0)[:2] == [1, 0.875]
    assert rates("constant", num_warmup_steps=2) == [1] * 8


@pytest.mark.parametrize("resume_at", [1, 3, 4, 6])
def test_a_resumed_schedule_goes_on(resume_at: int) -> None:
    unbroken = rates("cosine", num_warmup_steps=4)
    assert rates("cosine", num_warmup_steps=4, resume_at=resume_at) == unbroken
