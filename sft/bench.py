"""Measure this recipe's training step against stock TRL's, in turn on the same machine.

    python sft/bench.py                                   gpt-oss-20b, LoRA, one GPU
    python sft/bench.py --model 120b --per_device_train_batch_size 1 --paths recipe    80 GB
    python sft/bench.py --use_peft false --num_layers 1 3 --per_device_train_batch_size 1
                                                          all weights, scaled to all layers
    python sft/bench.py --paths recipe no_packing compiled      what one lever is worth
    python sft/bench.py --tiny                            small shapes, on CPU too

A path (bench_paths.PATHS has them all) is a SFTTrainer with LoRA r=8 on every linear layer and
every expert (--use_peft false: all weights) over the same random conversations, in a process of
its own:

    recipe         packed to max_length; experts.py, beside LoRA in MXFP4; the attention that
                   attention.py chooses; saver.py
    stock          TRL's defaults: padded batches, PEFT's own LoRA on bf16 experts, eager attention
    stock_packed   stock, but for TRL's packing: as many tokens a step as the recipe

recipe : stock is what a user gains at the same flags: a batch of the recipe's holds sequences full
of tokens, of stock's as many conversations. recipe : stock_packed is at equal tokens a step, though
eager attention lets the conversations of a row see each other, and takes the square of all tokens
in memory: give it --per_device_train_batch_size 1. A path that fails has its column, empty.

All weights are trained by accelerate with fsdp2.yaml on one GPU: fp32 weights, gradients and AdamW
states, bf16 computing (16 bytes a parameter: 3 layers of 20b on 80 GB). Of two numbers of layers,
times are taken as a fixed part and one a layer, and scaled to all layers; two that differ by an
even number have sliding and full layers in equal parts. What travels between GPUs is not in it:
roofline.py has that.

Widths, vocabulary and routing are gpt-oss's, with random weights; lengths are lognormal with the
default dataset's mean (synthetic.py). tokens/s counts no padding. MFU is metrics.flops_per_token,
of which the docstring gives the formula, over the GPU's dense bf16 peak. Windows of some steps are
timed after a warm-up; the table has their median.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import HfArgumentParser

from finetune.benchmark.synthetic import MEAN_LENGTH, make_config
from finetune.benchmark.timing import Windows, now, time_parts, trace
from finetune.benchmark.variants import PATHS, BenchArguments, is_launched, make_trainer
from finetune.errors import UserError, one_line_errors
from finetune.model.flops import flops_per_token, peak_flops

TIMES = ("seconds_per_step", "attention", "experts", "loss", "optimizer", "saving")


def measure(args: BenchArguments, path: str) -> dict[str, Any]:
    """One path's figures; times are a step's, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, PATHS[path], Path(folder))
        config, windows = trainer.model.config, Windows(args)
        trainer.add_callback(windows)
        trainer.train()
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        started = now()
        trainer._save_checkpoint(trainer.model, None)
        saving = now() - started
        if hasattr(trainer, "saver"):
            trainer.saver.finish()  # so that it disturbs no other part
        trained = next(p for p in trainer.model.parameters() if p.requires_grad)
        sharded = ", FSDP2" if isinstance(trained, DTensor) else ""
        parts = time_parts(trainer)
        if args.trace:
            trace(trainer, Path(args.trace) / f"{label(path, *args.num_layers)}.json")
    rate = median(n / s for n, s in zip(windows.tokens, windows.seconds, strict=True))
    times = {
        "seconds_per_step": median(windows.seconds) / args.steps_per_window,
        **parts,
        "optimizer": median(windows.optimizer[args.warmup_steps :]),
        "saving": saving,
    }
    return {
        "path": label(path, *args.num_layers),
        "num_layers": config.num_hidden_layers,
        "tokens_per_step": median(windows.tokens) / args.steps_per_window,
        "tokens_per_sec": round(rate, 1),
        "mfu": mfu(rate, config, lora=args.use_peft),
        "peak_memory_gib": round(peak, 2) if peak is not None else None,
        **{name: round(times[name], 4) for name in TIMES},
        "attention_implementation": config._attn_implementation,
        "trained_weights": str(trained.dtype).removeprefix("torch.") + sharded,
    }


def label(path: str, *num_layers: int | None) -> str:
    return f"{path}, {num_layers[0]}-layer slice" if num_layers and num_layers[0] else path


def mfu(tokens_per_sec: float, config: Any, *, lora: bool) -> float | None:
    peak = peak_flops()
    flops = flops_per_token(config, context=MEAN_LENGTH, lora=lora)
    return round(tokens_per_sec * flops / peak, 4) if peak else None


def scale(args: BenchArguments, path: str, few: Any, more: Any) -> dict[str, Any]:
    """The figures at all layers, from those at two numbers of them: a + b * layers."""
    config = make_config(args.model)  # in full, --tiny too
    num_layers = config.num_hidden_layers
    if "failed" in few or "failed" in more:
        return {"path": f"{path}, scaled to {num_layers} layers", "failed": "not measured"}
    steps = (num_layers - few["num_layers"]) / (more["num_layers"] - few["num_layers"])
    times = {name: few[name] + steps * (more[name] - few[name]) for name in TIMES}
    rate = more["tokens_per_step"] / times["seconds_per_step"]
    return {
        **more,
        "path": f"{path}, scaled to {num_layers} layers",
        "num_layers": num_layers,
        "tokens_per_sec": round(rate, 1),
        "mfu": mfu(rate, config, lora=args.use_peft),
        "peak_memory_gib": None,
        **{name: round(times[name], 4) for name in TIMES},
    }


def measure_apart(path: str, num_layers: int | None, *, use_peft: bool) -> dict[str, Any]:
    """Measure a path in a process of its own, started as the recipe starts it."""
    launcher = [sys.executable]
    if not use_peft:
        config = Path(__file__).with_name("fsdp2.yaml")
        launcher += ["-m", "accelerate.commands.launch", f"--config_file={config}"]
        launcher += ["--num_machines=1", "--num_processes=1", "--main_process_port=0"]
    flags = [*sys.argv[1:], "--paths", path]
    if num_layers is not None:
        flags += ["--num_layers", str(num_layers)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [*launcher, __file__, *flags, "--output", str(output)]
        status = subprocess.run(command, stdout=sys.stderr).returncode
        if output.exists():
            return json.loads(output.read_text())["results"][0]
    return {"path": label(path, num_layers), "failed": f"exit status {status}"}


def measure_all(args: BenchArguments) -> list[dict[str, Any]]:
    """Every path at every number of layers, and scaled where there are two."""
    if len(args.paths) == 1 and len(args.num_layers) < 2 and (args.use_peft or is_launched()):
        try:
            return [measure(args, args.paths[0])]
        except torch.OutOfMemoryError:
            return [{"path": label(args.paths[0], *args.num_layers), "failed": "out of memory"}]
    results = []
    counts: list[int | None] = [*args.num_layers] or [None]
    for path in args.paths:
        measured = [measure_apart(path, count, use_peft=args.use_peft) for count in counts]
        results += measured
        if len(measured) == 2:
            results.append(scale(args, path, *measured))
    return results


def show(results: list[dict[str, Any]]) -> None:
    """The table, as Markdown: what the README holds is pasted from here."""
    lines = ["| | " + " | ".join(result["path"] for result in results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    names = dict.fromkeys(name for result in results for name in result if name != "path")
    for name in names:
        values = ["-" if r.get(name) is None else str(r[name]) for r in results]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(values)} |")
    first = results[0]
    for name in ("tokens_per_sec", "peak_memory_gib"):
        ratios = [
            f"{first[name] / r[name]:.2f}" if first.get(name) and r.get(name) else "-"
            for r in results
        ]
        shown = f"{first['path']}'s {name.replace('_', ' ')} : its own"
        lines.append(f"| {shown} | {' | '.join(ratios)} |")
    print("\n".join(lines))


def check(args: BenchArguments) -> None:
    """Raise UserError for a path that does not exist, or layers that cannot be scaled."""
    unknown = [path for path in args.paths if path not in PATHS]
    if unknown:
        raise UserError(f"--paths {' '.join(unknown)}: no such path; there are {', '.join(PATHS)}")
    counts = args.num_layers
    if len(counts) > 2 or len(set(counts)) < len(counts) or any(count < 1 for count in counts):
        raise UserError(
            f"--num_layers {' '.join(map(str, counts))}: give one number, or two different ones"
        )


def main() -> None:
    (args,) = HfArgumentParser(BenchArguments).parse_args_into_dataclasses()
    with one_line_errors():
        check(args)
        results = measure_all(args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    report = {"device": device, "torch": torch.__version__, "args": vars(args), "results": results}
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=2))
    show(results)
    if all("failed" in result for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
