"""One path measured. bench.py runs this in a process of its own for each path.

The figures are written as soon as they are known, and again after each part that is timed after
them, so that a part that fails or runs out of memory takes nothing else with it.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import torch
from torch.distributed.tensor import DTensor
from trl import SFTTrainer

from finetune.benchmark.options import BenchArguments
from finetune.benchmark.results import ARGUMENTS, RESULT, TIMES, label
from finetune.benchmark.synthetic import MEAN_LENGTH
from finetune.benchmark.timing import PartTimer, Windows, now, trace
from finetune.benchmark.trainers import make_trainer
from finetune.benchmark.variants import PATHS
from finetune.errors import UserError
from finetune.model.flops import flops_per_token, peak_flops

Part = Callable[[], float | None]


def measure_in(folder: Path) -> None:
    """Measure the one path that the arguments in `folder` name; leave the result there.

    An error is written into the result, not raised: what was measured before it counts.
    """
    args = BenchArguments(**json.loads((folder / ARGUMENTS).read_text()))
    (path,) = args.paths
    run_dir = folder / "run"
    run_dir.mkdir()
    progress(f"{label(path, *args.num_layers)}: random weights are made")
    datasets.disable_progress_bars()  # their redrawn lines hide the plain ones of this benchmark

    def write(result: dict[str, Any]) -> None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        text = json.dumps({"device": device, "torch": torch.__version__, "result": result})
        unfinished = folder / f"{RESULT}.unfinished"
        unfinished.write_text(text)
        os.replace(unfinished, folder / RESULT)  # a process killed here leaves the older result

    result: dict[str, Any] = {"path": label(path, *args.num_layers)}
    write(result)
    try:
        measure(args, path, run_dir, result=result, write=write)
    except Exception as error:
        write(result | {"failed": reason(error)})


def measure(
    args: BenchArguments,
    path: str,
    folder: Path,
    *,
    result: dict[str, Any],
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Add a path's figures to `result`: rates and times of a step in seconds."""
    trainer = make_trainer(args, PATHS[path], folder)
    windows = Windows(args, progress=lambda text: progress(f"{result['path']}: {text}"))
    trainer.add_callback(windows)
    trainer.train()
    result |= figures(args, trainer, windows)
    write(result)
    progress(f"{result['path']}: {summary(result)}")

    timer = PartTimer(trainer)
    parts: dict[str, Part] = {}
    if args.save:
        parts["saving"] = lambda: save_checkpoint(trainer)  # while the model is as training left it
    parts |= {"attention": timer.attention, "experts": timer.experts, "loss": timer.loss}
    if args.trace:
        file = Path(args.trace) / f"{result['path']}.json"
        parts["trace"] = lambda: trace(trainer, file)
    time_parts(parts, result=result, write=write)


def figures(args: BenchArguments, trainer: SFTTrainer, windows: Windows) -> dict[str, Any]:
    """What the windows have measured; the parts that are timed on their own are None as yet."""
    config = trainer.model.config
    rate = median(n / s for n, s in zip(windows.tokens, windows.seconds, strict=True))
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    trained = next(p for p in trainer.model.parameters() if p.requires_grad)
    sharded = ", FSDP2" if isinstance(trained, DTensor) else ""
    times = dict.fromkeys(TIMES) | {
        "seconds_per_step": round(median(windows.seconds) / args.steps_per_window, 4),
        "optimizer": round(median(windows.optimizer[args.warmup_steps :]), 4),
    }
    return {
        "num_layers": config.num_hidden_layers,
        "tokens_per_step": median(windows.tokens) / args.steps_per_window,
        "tokens_per_sec": round(rate, 1),
        "mfu": mfu(rate, config, lora=args.use_peft),
        "peak_memory_gib": round(peak, 2) if peak is not None else None,
        **times,
        "attention_implementation": config._attn_implementation,
        "trained_weights": str(trained.dtype).removeprefix("torch.") + sharded,
    }


def summary(result: dict[str, Any]) -> str:
    """The figures of the windows in one line, for who cannot wait for the table."""
    peak = result["peak_memory_gib"]
    memory = "" if peak is None else f", {peak} GiB at most"
    share = "" if result["mfu"] is None else f", MFU {result['mfu']:.1%}"
    return f"{result['tokens_per_sec']:,.0f} tokens/s{share}{memory}; its parts follow"


def mfu(tokens_per_sec: float, config: Any, *, lora: bool) -> float | None:
    """Model FLOPs utilization, 0 to 1; None on a device whose peak is not known."""
    peak = peak_flops()
    flops = flops_per_token(config, context=MEAN_LENGTH, lora=lora)
    return round(tokens_per_sec * flops / peak, 4) if peak else None


def time_parts(
    parts: dict[str, Part],
    *,
    result: dict[str, Any],
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Run each part, put its seconds into `result` and write that.

    A part that fails is named under "failed", its figure stays None, and the next one follows.
    """
    failures = []
    for name, run in parts.items():
        progress(f"{result['path']}: {name}")
        try:
            seconds = run()
            if seconds is not None:
                result[name] = round(seconds, 4)
        except Exception as error:
            failures.append(f"{name}: {reason(error)}")
            result["failed"] = "; ".join(failures)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what a part that ran out of memory has left
        write(result)


def save_checkpoint(trainer: SFTTrainer) -> float:
    """Seconds that training waits for a checkpoint."""
    started = now()
    trainer._save_checkpoint(trainer.model, None)
    seconds = now() - started
    if hasattr(trainer, "saver"):
        trainer.saver.finish()  # writing goes on in the background and would disturb other parts
    return seconds


def reason(error: Exception) -> str:
    """An error in a few words, for the table; where it comes from goes to stderr."""
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
