"""Measure this recipe's training step against stock TRL's, in turn on the same machine.

    python sft/bench.py                                   gpt-oss-20b, LoRA, one GPU
    python sft/bench.py --model 120b --per_device_train_batch_size 1 --paths recipe    80 GB
    python sft/bench.py --use_peft false --num_layers 4   all weights, as many layers as fit
    python sft/bench.py --paths recipe no_packing compiled      what one lever is worth; see PATHS
    python sft/bench.py --tiny                            small shapes, on CPU too

A path is a SFTTrainer with LoRA r=8 on every linear layer and every expert (--use_peft false: all
weights) over the same random conversations, in a process of its own:

    recipe    packed to max_length; experts.py, beside LoRA in MXFP4; the attention attention.py
              chooses, saver.py
    stock     TRL's defaults: padded batches, PEFT's own LoRA on bf16 experts, eager attention

Widths, vocabulary and routing are gpt-oss's, with random weights; lengths are those of the default
dataset (synthetic.py). tokens/s counts no padding. MFU is metrics.flops_per_token, of which the
docstring gives the formula, over the GPU's dense bf16 peak. Windows of some steps are timed after a
warm-up; the table has their median.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from transformers import GptOssForCausalLM, HfArgumentParser, TrainerCallback
from trl import ModelConfig, SFTConfig, SFTTrainer

import experts
from attention import choose_attention, isolate_packed_sequences
from metrics import flops_per_token, peak_flops
from model import lora_config
from resumable import ResumableSFTTrainer
from saver import Saver
from synthetic import MEAN_LENGTH, conversations, make_config, make_model, make_tokenizer


@dataclass(frozen=True)
class Setup:
    """What a path trains with; the defaults are the recipe's."""

    packing: bool = True
    dequantize: bool = False  # of LoRA's base
    attn_implementation: str | None = None  # None: what attention.py chooses
    experts_implementation: str = experts.NAME
    lora_beside_experts: bool = True
    saves_in_background: bool = True
    flags: dict[str, Any] = field(default_factory=dict)  # of SFTConfig


PATHS = {
    "recipe": Setup(),
    "stock": Setup(
        packing=False,
        dequantize=True,
        attn_implementation="eager",
        experts_implementation="grouped_mm",
        lora_beside_experts=False,
        saves_in_background=False,
    ),
    # The recipe but for one lever.
    "bf16_base": Setup(dequantize=True),
    "no_packing": Setup(packing=False),
    "eager_attention": Setup(attn_implementation="eager"),
    "flex_attention": Setup(attn_implementation="flex_attention"),
    "stock_experts": Setup(
        dequantize=True, experts_implementation="grouped_mm", lora_beside_experts=False
    ),
    "stock_expert_lora": Setup(dequantize=True, lora_beside_experts=False),
    "no_checkpointing": Setup(flags={"activation_checkpointing": False}),
    "compiled": Setup(flags={"torch_compile": True}),
}


@dataclass
class BenchArguments:
    """What to measure, and how long."""

    model: Literal["20b", "120b"] = "20b"
    num_layers: int | None = field(default=None, metadata={"help": "Fewer than the model has."})
    use_peft: bool = True
    max_length: int = 4096
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Packed sequences a step; stock pads as many conversations."}
    )
    num_windows: int = 5
    steps_per_window: int = 4
    warmup_steps: int = 4
    tiny: bool = False
    paths: list[str] = field(default_factory=lambda: ["recipe", "stock"])
    trace: str | None = field(
        default=None, metadata={"help": "A folder for the profiler's traces."}
    )
    output: str | None = field(default=None, metadata={"help": "A file for the results as JSON."})


class Windows(TrainerCallback):
    """Times windows of steps, and the optimizer's part in them. All in seconds."""

    def __init__(self, args: BenchArguments) -> None:
        self.args = args
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.optimizer: list[float] = []
        self.started, self.started_tokens = 0.0, 0

    def now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self.args.warmup_steps
        if done < 0 or done % self.args.steps_per_window:
            return
        now, tokens = self.now(), int(state.num_input_tokens_seen)
        if done:
            self.seconds.append(now - self.started)
            self.tokens.append(tokens - self.started_tokens)
        elif torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.started, self.started_tokens = self.now(), tokens

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer_started = self.now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer.append(self.now() - self.optimizer_started)


def make_trainer(args: BenchArguments, setup: Setup, folder: Path) -> SFTTrainer:
    config = make_config(args.model, num_layers=args.num_layers, tiny=args.tiny)
    config._attn_implementation = setup.attn_implementation or choose_attention()
    config._experts_implementation = setup.experts_implementation
    model = make_model(config, packed=args.use_peft and not setup.dequantize)
    if setup.packing:
        isolate_packed_sequences(model)
    max_steps = args.warmup_steps + args.num_windows * args.steps_per_window
    training_args = SFTConfig(
        **{
            "output_dir": str(folder),
            "max_steps": max_steps,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "packing": setup.packing,
            "max_length": args.max_length,
            "learning_rate": 1e-6,
            "router_aux_loss_coef": 0.0,
            "activation_checkpointing": True,
            "include_num_input_tokens_seen": "non_padding",
            "use_cpu": not torch.cuda.is_available(),
            "logging_steps": 1000,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "bf16": True,
            **setup.flags,
        }
    )
    kwargs: dict[str, Any] = {
        "model": model,
        "args": training_args,
        # Without packing a row is a conversation, and some are left.
        "train_dataset": conversations(
            (max_steps + 1) * args.per_device_train_batch_size * args.max_length,
            max_length=args.max_length,
            vocab_size=config.vocab_size,
        ),
        "processing_class": make_tokenizer(),
        "peft_config": lora_config(
            model, ModelConfig(use_peft=args.use_peft, lora_r=8, lora_alpha=16, lora_dropout=0.0)
        ),
    }
    if setup.saves_in_background:
        saver = Saver(folder, every_minutes=1e6, keep=None, manifest={})
        trainer = ResumableSFTTrainer(**kwargs, saver=saver)
    else:
        trainer = SFTTrainer(**kwargs)
    if setup.lora_beside_experts:
        experts.keep_lora_beside_experts(trainer.model)
    return trainer


def measure(args: BenchArguments, path: str) -> dict[str, Any]:
    """One path's figures; times are a step's, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, PATHS[path], Path(folder))
        config, windows = trainer.model.config, Windows(args)
        trainer.add_callback(windows)
        trainer.train()
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        started = windows.now()
        trainer._save_checkpoint(trainer.model, None)
        saving = windows.now() - started
        parts = time_parts(args, trainer.model)
        if args.trace:
            trace(trainer, Path(args.trace) / f"{path}.json")
    rate = median(n / s for n, s in zip(windows.tokens, windows.seconds, strict=True))
    step = median(windows.seconds) / args.steps_per_window
    flops = flops_per_token(config, context=MEAN_LENGTH, lora=args.use_peft)
    optimizer = median(windows.optimizer[args.warmup_steps :])
    return {
        "path": path,
        "tokens_per_sec": round(rate, 1),
        "mfu": round(rate * flops / known, 4) if (known := peak_flops()) else None,
        "peak_memory_gib": round(peak, 2) if peak is not None else None,
        "seconds_per_step": round(step, 4),
        **{name: round(seconds, 4) for name, seconds in parts.items()},
        "optimizer": round(optimizer, 4),
        "saving": round(saving, 4),
        "attention_implementation": config._attn_implementation,
    }


def time_parts(args: BenchArguments, model: torch.nn.Module) -> dict[str, float]:
    """Forward and backward of all attention and of all experts, alone, over a packed step."""
    base = next(module for module in model.modules() if isinstance(module, GptOssForCausalLM))
    layers, config = base.model.layers, base.config
    shape = (args.per_device_train_batch_size, args.max_length, config.hidden_size)
    x = torch.randn(shape, device=base.device, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(args.max_length, device=base.device)[None]
    rotary = base.model.rotary_emb(x, positions)

    def attention() -> torch.Tensor:
        outputs = [layer.self_attn(x, rotary, attention_mask=None)[0] for layer in layers[:2]]
        return outputs[0] + outputs[-1]

    def feed_forward() -> torch.Tensor:
        outputs = [layer.mlp(x)[0] for layer in layers[:2]]
        return outputs[0] + outputs[-1]

    timed = {}
    for name, part in (("attention", attention), ("experts", feed_forward)):
        seconds = []
        for _ in range(4):  # the first is the warm-up
            started = Windows(args).now()
            part().sum().backward()
            seconds.append(Windows(args).now() - started)
        timed[name] = median(seconds[1:]) * len(layers) / min(2, len(layers))
    return timed


def trace(trainer: SFTTrainer, file: Path) -> None:
    """One more step, under torch's profiler, for chrome://tracing or Perfetto."""
    file.parent.mkdir(parents=True, exist_ok=True)
    inputs = next(iter(trainer.get_train_dataloader()))
    with torch.profiler.profile() as profiler:
        trainer.training_step(trainer.model_wrapped, trainer._prepare_inputs(inputs))
    profiler.export_chrome_trace(str(file))


def show(results: list[dict[str, Any]]) -> None:
    """The table, as Markdown: what the README holds is pasted from here."""
    lines = ["| | " + " | ".join(result["path"] for result in results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for name in [name for name in results[0] if name != "path"]:
        values = ["-" if result[name] is None else str(result[name]) for result in results]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(values)} |")
    first = results[0]
    for name in ("tokens_per_sec", "peak_memory_gib"):
        ratios = [f"{first[name] / r[name]:.2f}" if r[name] else "-" for r in results]
        shown = f"{first['path']}'s {name.replace('_', ' ')} : its own"
        lines.append(f"| {shown} | {' | '.join(ratios)} |")
    print("\n".join(lines))


def main() -> None:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()
    if len(args.paths) == 1:
        results = [measure(args, args.paths[0])]
    else:
        results = []
        for path in args.paths:
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                command = [sys.executable, __file__, *sys.argv[1:]]
                command += ["--paths", path, "--output", file.name]
                subprocess.run(command, check=True, stdout=sys.stderr)
                results += json.loads(Path(file.name).read_text())["results"]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    report = {"device": device, "torch": torch.__version__, "args": vars(args), "results": results}
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2))
    show(results)


if __name__ == "__main__":
    main()
