"""The learning rate of each step."""

from collections.abc import Callable
from functools import partial

from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def warm_up_from_first_increment(scheduler: LRScheduler, *, num_warmup_steps: int) -> LRScheduler:
    """The same schedule, whose warm-up begins one increment above zero.

    Step s (from 0) of w warm-up steps gets the share (s + 1) / w of the learning rate, as in
    nanochat. transformers gives it s / w: its first step trains nothing. Steps after the warm-up
    keep their rates. A schedule that is no function of the step (reduce_lr_on_plateau) has no
    warm-up and is returned as it is. Called before the first step.
    """
    if num_warmup_steps < 1 or not isinstance(scheduler, LambdaLR):
        return scheduler
    shifted: list[Callable[[int], float]] = [
        partial(_shifted, share, num_warmup_steps) for share in scheduler.lr_lambdas
    ]
    return LambdaLR(scheduler.optimizer, shifted)


def _shifted(share: Callable[[int], float], num_warmup_steps: int, step: int) -> float:
    return share(step + 1 if step < num_warmup_steps else step)
