"""Callbacks of the trainer: rates in the log entries, and an evaluation at the end."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from finetune.model.flops import peak_flops
from finetune.summary import evaluations


class Throughput(TrainerCallback):
    """Adds tokens_per_sec_per_gpu, mfu (0 to 1) and peak_memory_gib to every logged loss.

    Rates are of the time since the entry before, without evaluations. mfu is left out where the
    device's peak FLOP/s is not known. clock: seconds, a parameter for tests.
    """

    def __init__(
        self,
        flops_per_token: float,
        *,
        num_processes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.flops_per_token = flops_per_token
        self.clock = clock
        self.num_processes = num_processes
        self.peak_flops = peak_flops()
        self.started = self.last_time = clock()
        self.started_tokens = self.last_tokens = 0
        self.evaluation_seconds = 0.0  # of this launch so far

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.started = self.last_time = self.clock()
        # A resumed run begins with the tokens of the launches before.
        self.started_tokens = self.last_tokens = state.num_input_tokens_seen
        if state.is_world_process_zero and self.peak_flops is None:
            print("mfu: not reported, this device's peak FLOP/s is not known", flush=True)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if "loss" not in logs:  # an entry of an evaluation, or the last one of all
            return
        now, num_tokens = self.clock(), state.num_input_tokens_seen
        rate = self.rate(num_tokens - self.last_tokens, now - self.last_time)
        self.last_time, self.last_tokens = now, num_tokens
        logs["tokens_per_sec_per_gpu"] = round(rate, 1)
        if self.peak_flops is not None:
            logs["mfu"] = round(rate * self.flops_per_token / self.peak_flops, 4)
        if torch.cuda.is_available():
            logs["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, metrics: dict[str, Any], **kwargs: Any
    ) -> None:
        # As if the clock had stood still during the evaluation.
        self.last_time += metrics["eval_runtime"]
        self.evaluation_seconds += metrics["eval_runtime"]

    def rate(self, num_tokens: int, seconds: float) -> float:
        """Tokens per second per GPU."""
        return num_tokens / seconds / self.num_processes

    def summary(self, state: TrainerState) -> dict[str, Any]:
        """Figures for the end of a run. Steps and tokens are those of all its launches, minutes and
        the rate those of this launch.
        """
        seconds = self.clock() - self.started
        num_tokens = state.num_input_tokens_seen
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        return {
            "steps": state.global_step,
            "tokens": num_tokens,
            "minutes": round(seconds / 60, 2),
            "tokens_per_sec_per_gpu": round(
                self.rate(num_tokens - self.started_tokens, seconds - self.evaluation_seconds), 1
            ),
            "final_loss": round(losses[-1], 4) if losses else None,
            **evaluations(state.log_history),
        }


class EvaluateAtEnd(TrainerCallback):
    """With --eval_strategy steps, also evaluates after the last step, so that the model that is
    saved has a score. (With --eval_strategy epoch Trainer does so by itself.)
    """

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True
