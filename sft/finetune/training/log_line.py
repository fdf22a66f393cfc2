"""The line that a run prints for each logged step, and those at both ends of an evaluation."""

import time
from collections.abc import Callable, Sized
from typing import Any

from transformers import TrainerCallback, TrainerState

from finetune.summary import perplexity


class LogLine(TrainerCallback):
    """Prints the log entries, on the first rank only, one line each.

    The time left is that of the steps left, at the mean pace of this launch, with its evaluations
    and saves. clock: seconds, a parameter for tests.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.began: tuple[float, int] | None = None  # this launch's first step: when, and which
        self.is_evaluating = False

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.began is None:
            self.began = self.clock(), state.global_step

    def on_prediction_step(
        self,
        args: Any,
        state: TrainerState,
        control: Any,
        eval_dataloader: Sized | None = None,
        **kwargs: Any,
    ) -> None:
        """Print how long an evaluation will be, after its first batch."""
        if not self.is_evaluating and eval_dataloader is not None and state.is_world_process_zero:
            print(f"{step_of_all(state)} · evaluating {len(eval_dataloader):,} batches", flush=True)
        self.is_evaluating = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_evaluating = False

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        where = step_of_all(state)
        if "loss" in logs:
            parts = [where, *self.time_left(state), *step_figures(logs)]
        elif "eval_loss" in logs:
            parts = [where, *evaluation_figures(logs)]
        else:
            return  # the entry of the whole run: the summary says more
        print(" · ".join(parts), flush=True)

    def time_left(self, state: TrainerState) -> list[str]:
        if self.began is None or state.global_step <= self.began[1]:
            return []
        started, first_step = self.began
        pace = (self.clock() - started) / (state.global_step - first_step)
        return [f"{duration(pace * (state.max_steps - state.global_step))} left"]


def step_of_all(state: TrainerState) -> str:
    return f"step {state.global_step}/{state.max_steps}"


def step_figures(logs: dict[str, Any]) -> list[str]:
    """Loss, learning rate, rate, MFU and memory, as far as they are known."""
    formats = {
        "loss": "loss {:.3f}",
        "learning_rate": "lr {:.1e}",
        "tokens_per_sec_per_gpu": "{:,.0f} tok/s/gpu",
        "mfu": "MFU {:.1%}",
        "peak_memory_gib": "{:.1f} GiB",
    }
    return [text.format(logs[name]) for name, text in formats.items() if name in logs]


def evaluation_figures(logs: dict[str, Any]) -> list[str]:
    """Loss, perplexity, token accuracy and how long the evaluation took."""
    loss = logs["eval_loss"]
    figures = ["evaluation", f"loss {loss:.3f}", f"perplexity {perplexity(loss):,.2f}"]
    if "eval_mean_token_accuracy" in logs:
        figures.append(f"token accuracy {logs['eval_mean_token_accuracy']:.1%}")
    if "eval_runtime" in logs:
        figures.append(f"took {duration(logs['eval_runtime'])}")
    return figures


def duration(seconds: float) -> str:
    """Seconds in the two largest units that a person needs: "45 s", "12 min", "1 h 12 min"."""
    minutes = round(seconds / 60)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = round(minutes / 60) if minutes >= 24 * 60 else minutes // 60
    return f"{hours // 24} d {hours % 24} h" if hours >= 24 else f"{hours} h {minutes % 60} min"
