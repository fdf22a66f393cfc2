"""How fast a run goes: tokens per second per GPU, MFU, peak memory, and the summary at its end."""

import math
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import register_flop_formula
from transformers import GptOssConfig, TrainerCallback, TrainerState

# Dense bf16 peak, FLOP/s, from NVIDIA's data sheets (H100 and H200 are the SXM parts).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


@register_flop_formula(torch.ops.aten._grouped_mm)
def grouped_mm_flops(
    a: tuple[int, ...], b: tuple[int, ...], *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    """What FlopCounterMode of torch 2.13 lacks: a (S, K) times b (E, K, N), or a (K, S) and b
    (S, N) for the gradient of a stack of weights; each row meets one expert.
    """
    return 2 * a[0] * a[1] * b[-1]


def flops_per_token(config: GptOssConfig, *, context: float, lora: bool) -> float:
    """FLOPs a token costs forward and backward, recomputation left out (MFU as in PaLM, app. B).

    2 FLOPs a weight forward and 2 for the gradient of its input; full runs add 2 for the weight's
    own. Only the experts a token visits count. Attention: 4 * heads * head_dim * keys a layer
    forward, twice that backward, with half of `context` keys on average (the mean length of a
    conversation), at most the window in sliding layers.
    """
    q_dim = config.num_attention_heads * config.head_dim
    kv_dim = config.num_key_value_heads * config.head_dim
    attention_weights = config.hidden_size * (2 * q_dim + 2 * kv_dim)
    expert_weights = 3 * config.hidden_size * config.intermediate_size
    router_weights = config.hidden_size * config.num_local_experts
    layer = attention_weights + config.num_experts_per_tok * expert_weights + router_weights
    active = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    keys = sum(
        min(context / 2, config.sliding_window) if kind == "sliding_attention" else context / 2
        for kind in config.layer_types
    )
    return (4 if lora else 6) * active + 12 * q_dim * keys


def peak_flops() -> float | None:
    """This GPU's peak, or None if it is not in the table: an MFU is never guessed."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


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


def evaluations(state: TrainerState) -> dict[str, list[float | None]]:
    """Of the held-out share, [before, after] training: loss, perplexity, token accuracy (0 to 1).

    before is None if no launch of the run evaluated at step 0; nothing if none ever did.
    """
    entries = [entry for entry in state.log_history if "eval_loss" in entry]
    if not entries:
        return {}
    first, last = entries[0] if entries[0]["step"] == 0 else {}, entries[-1]
    losses = [entry.get("eval_loss") for entry in (first, last)]
    accuracies = [entry.get("eval_mean_token_accuracy") for entry in (first, last)]
    named = {
        "eval_loss": losses,
        "eval_perplexity": [None if loss is None else perplexity(loss) for loss in losses],
        "eval_token_accuracy": accuracies,
    }
    return {
        name: [None if value is None else round(value, 4) for value in values]
        for name, values in named.items()
    }


def perplexity(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf


class EvaluateAtEnd(TrainerCallback):
    """With --eval_strategy steps, evaluate what is saved at the end, not only every --eval_steps
    (Trainer itself evaluates at the end of an epoch).
    """

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True


def print_summary(summary: dict[str, Any], *, title: str) -> None:
    """Print the table a person reads at the end of a run."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), as_text(value))
    Console(width=100).print(table)


def as_text(value: Any) -> str:
    """[before, after] with an arrow; integers with commas."""
    if isinstance(value, list):
        return " -> ".join("not evaluated" if part is None else str(part) for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
