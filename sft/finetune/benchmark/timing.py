"""The time of a training step, and of its parts. All times are in seconds."""

import time
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback
from transformers.modeling_outputs import MoeModelOutputWithPast
from trl import SFTTrainer

from finetune.benchmark.options import BenchArguments
from finetune.benchmark.trainers import gpt_oss


def now() -> float:
    """Seconds on a clock, read after the GPU has finished the work it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Windows(TrainerCallback):
    """Times windows of steps, and the optimizer's part of each step."""

    def __init__(self, args: BenchArguments, *, progress: Callable[[str], None]) -> None:
        self.args, self.progress = args, progress
        self.seconds: list[float] = []  # of each window
        self.tokens: list[int] = []  # of each window, without padding
        self.optimizer: list[float] = []  # of each step, the warm-up's too
        self.started, self.started_tokens = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress(f"warm-up: {self.args.warmup_steps} steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        timed_steps = state.global_step - self.args.warmup_steps
        if timed_steps < 0 or timed_steps % self.args.steps_per_window:
            return
        seconds, tokens = now() - self.started, int(state.num_input_tokens_seen)
        if timed_steps:
            self.add(seconds, tokens - self.started_tokens)
        elif torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # the peak is that of steps after the warm-up
        self.started, self.started_tokens = now(), tokens

    def add(self, seconds: float, tokens: int) -> None:
        self.seconds.append(seconds)
        self.tokens.append(tokens)
        self.progress(
            f"window {len(self.seconds)} of {self.args.num_windows}: "
            f"{seconds / self.args.steps_per_window:.3f} s a step, {tokens / seconds:,.0f} tokens/s"
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer_started = now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer.append(now() - self.optimizer_started)


class Calls:
    """The inputs and outputs of some modules, recorded in one forward of a batch."""

    def __init__(self, trainer: SFTTrainer, modules: list[torch.nn.Module]) -> None:
        self.inputs: dict[torch.nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.outputs: dict[torch.nn.Module, Any] = {}

        def record(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self.inputs[module], self.outputs[module] = (args, kwargs), output

        hooks = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
        self.batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        with torch.no_grad():
            trainer.compute_loss(trainer.model_wrapped, dict(self.batch))
        for hook in hooks:
            hook.remove()

    def repeat(self, module: torch.nn.Module) -> torch.Tensor:
        """The module's output for the recorded input, from where backward can start."""
        args, kwargs = self.inputs[module]
        if args:
            args = (leaf(args[0]), *args[1:])
        else:
            kwargs = kwargs | {"hidden_states": leaf(kwargs["hidden_states"])}
        return module(*args, **kwargs)[0]


def leaf(x: torch.Tensor) -> torch.Tensor:
    """The same values, as an input whose gradient is wanted."""
    return x.detach().requires_grad_()


class PartTimer:
    """Times all attention, all experts and the loss of a step: forward and backward, each alone.

    A part is given the inputs it has in a step of its path: the hidden states of a batch, masks or
    packed positions, the routing. Only the first two layers, one of each kind of attention, are
    timed; their time is scaled to all layers.
    """

    def __init__(self, trainer: SFTTrainer) -> None:
        self.trainer = trainer
        self.base = gpt_oss(trainer.model)
        self.layers = self.base.model.layers[:2]
        self.scale = self.base.config.num_hidden_layers / len(self.layers)

    @cached_property
    def calls(self) -> Calls:
        # Made at the first use, not in __init__: this forward can run out of memory as well.
        modules = [part for layer in self.layers for part in (layer.self_attn, layer.mlp)]
        calls = Calls(self.trainer, [*modules, self.base.model.norm])
        unshard(self.trainer.model, self.layers)
        return calls

    def attention(self) -> float:
        return self.scale * self.seconds([layer.self_attn for layer in self.layers])

    def experts(self) -> float:
        return self.scale * self.seconds([layer.mlp for layer in self.layers])

    def seconds(self, modules: list[torch.nn.Module]) -> float:
        calls = self.calls
        with self.trainer.accelerator.autocast():  # as its forward runs in a step
            return seconds(lambda: (calls.repeat(module) for module in modules))

    def loss(self) -> float:
        """TRL's fused head and its loss, on the hidden states that the decoder has returned."""
        calls = self.calls

        def head() -> list[torch.Tensor]:
            decoded = MoeModelOutputWithPast(last_hidden_state=leaf(calls.outputs[norm]))
            # TRL's forward calls the decoder and then the head: here the decoder's output is known.
            with patch.object(self.base.model, "forward", lambda **kwargs: decoded):
                output = self.base.forward(labels=calls.batch["labels"], fused_lm_head=True)
            return [output.log_probs]

        norm = self.base.model.norm
        with self.trainer.accelerator.autocast():  # as its forward runs in a step
            return seconds(head)


def unshard(model: torch.nn.Module, layers: Any) -> None:
    """Under FSDP2, gather the weights of the parts: its hooks do so for complete layers only."""
    for module in (model, *layers):
        if isinstance(module, FSDPModule):
            module.unshard()


def seconds(forward: Callable[[], Iterable[torch.Tensor]]) -> float:
    """The time of a forward and its backward: the median of three, after one to warm up."""
    measured = []
    for _ in range(4):
        started = now()
        for output in forward():
            output.sum().backward()
        measured.append(now() - started)
    return median(measured[1:])


def trace(trainer: SFTTrainer, file: Path) -> None:
    """Write one more step as torch's profiler records it, for chrome://tracing or Perfetto."""
    file.parent.mkdir(parents=True, exist_ok=True)
    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.profiler.profile() as profiler:
        trainer.training_step(trainer.model_wrapped, trainer._prepare_inputs(inputs))
    profiler.export_chrome_trace(str(file))
