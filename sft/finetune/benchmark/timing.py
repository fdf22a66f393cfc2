"""A training step's time, and that of its parts."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback
from transformers.modeling_outputs import MoeModelOutputWithPast
from trl import SFTTrainer

from finetune.benchmark.variants import BenchArguments, gpt_oss


def now() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Windows(TrainerCallback):
    """Times windows of steps, and the optimizer's part in them. All in seconds."""

    def __init__(self, args: BenchArguments) -> None:
        self.args = args
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.optimizer: list[float] = []
        self.started, self.started_tokens = 0.0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self.args.warmup_steps
        if done < 0 or done % self.args.steps_per_window:
            return
        seconds, tokens = now() - self.started, int(state.num_input_tokens_seen)
        if done:
            self.seconds.append(seconds)
            self.tokens.append(tokens - self.started_tokens)
        elif torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.started, self.started_tokens = now(), tokens

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer_started = now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer.append(now() - self.optimizer_started)


class Calls:
    """What modules are called with and return in one forward of a real batch."""

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

    def again(self, module: torch.nn.Module) -> torch.Tensor:
        """The module's output for the same input, which wants a gradient."""
        args, kwargs = self.inputs[module]
        if args:
            args = (leaf(args[0]), *args[1:])
        else:
            kwargs = kwargs | {"hidden_states": leaf(kwargs["hidden_states"])}
        return module(*args, **kwargs)[0]


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_()


def time_parts(trainer: SFTTrainer) -> dict[str, float]:
    """Seconds a step of all attention, all experts and the loss: forward and backward, alone.

    Each is given what it has in a step of this path: the hidden states of a batch, their masks or
    packed positions, their routing. Two layers, one of each kind of attention, stand for all.
    """
    base = gpt_oss(trainer.model)
    layers, norm = base.model.layers[:2], base.model.norm
    attentions, feed_forwards = [x.self_attn for x in layers], [x.mlp for x in layers]
    calls = Calls(trainer, [*attentions, *feed_forwards, norm])

    def loss() -> torch.Tensor:
        """TRL's fused head, as it follows the decoder in a step."""
        decoded = MoeModelOutputWithPast(last_hidden_state=leaf(calls.outputs[norm]))
        with patch.object(base.model, "forward", lambda **kwargs: decoded):
            return base.forward(labels=calls.batch["labels"], fused_lm_head=True).log_probs

    share = len(layers) / base.config.num_hidden_layers
    unshard(trainer.model, layers)
    with trainer.compute_loss_context_manager():
        return {
            "attention": seconds(*((lambda x=x: calls.again(x)) for x in attentions)) / share,
            "experts": seconds(*((lambda x=x: calls.again(x)) for x in feed_forwards)) / share,
            "loss": seconds(loss),
        }


def unshard(model: torch.nn.Module, layers: Any) -> None:
    """Under FSDP2, gather what the parts need: its own hooks are those of whole layers."""
    for module in (model, *layers):
        if isinstance(module, FSDPModule):
            module.unshard()


def seconds(*parts: Callable[[], torch.Tensor]) -> float:
    """Of one forward and backward of all parts: the median of three, after a warm-up."""
    measured = []
    for _ in range(4):
        started = now()
        for part in parts:
            part().sum().backward()
        measured.append(now() - started)
    return median(measured[1:])


def trace(trainer: SFTTrainer, file: Path) -> None:
    """One more step, under torch's profiler, for chrome://tracing or Perfetto."""
    file.parent.mkdir(parents=True, exist_ok=True)
    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.profiler.profile() as profiler:
        trainer.training_step(trainer.model_wrapped, trainer._prepare_inputs(inputs))
    profiler.export_chrome_trace(str(file))
