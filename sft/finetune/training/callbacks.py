"""What is logged while a run trains: tokens per second per GPU, MFU and peak memory."""

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from finetune.model.flops import peak_flops
from finetune.summary import evaluations


class Throughput(TrainerCallback):
    """Adds tokens_per_sec_per_gpu, mfu (0 to 1) and peak_memory_gib to every logged loss."""

    def __init__(self, flops_per_token: float, *, num_processes: int) -> None:
        self.flops_per_token = flops_per_token
        self.num_processes = num_processes
        self.peak_flops = peak_flops()
        self.started = self.last_time = time.monotonic()
        self.started_tokens = self.last_tokens = 0
        self.evaluating = 0.0  # seconds of this launch, in none of its rates

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.started = self.last_time = time.monotonic()
        self.started_tokens = self.last_tokens = state.num_input_tokens_seen
        if state.is_world_process_zero and self.peak_flops is None:
            print("mfu: not reported, this device's peak FLOP/s is not known", flush=True)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        if "loss" not in logs:
            return
        now, num_tokens = time.monotonic(), state.num_input_tokens_seen
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
        self.last_time += metrics["eval_runtime"]
        self.evaluating += metrics["eval_runtime"]

    def rate(self, num_tokens: int, seconds: float) -> float:
        """Tokens per second per GPU."""
        return num_tokens / seconds / self.num_processes

    def summary(self, state: TrainerState) -> dict[str, Any]:
        """What the run came to: the tokens of all its launches, the time and rate of this one."""
        seconds = time.monotonic() - self.started
        num_tokens = state.num_input_tokens_seen
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        return {
            "steps": state.global_step,
            "tokens": num_tokens,
            "minutes": round(seconds / 60, 2),
            "tokens_per_sec_per_gpu": round(
                self.rate(num_tokens - self.started_tokens, seconds - self.evaluating), 1
            ),
            "final_loss": round(losses[-1], 4) if losses else None,
            **evaluations(state),
        }


class EvaluateAtEnd(TrainerCallback):
    """With --eval_strategy steps, evaluate what is saved at the end, not only every --eval_steps
    (Trainer itself evaluates at the end of an epoch).
    """

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True
