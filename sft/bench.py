"""Measure a training step of this recipe beside stock TRL's, one after the other on this machine.

    python sft/bench.py                                   gpt-oss-20b, LoRA, one GPU
    python sft/bench.py --model 120b --per_device_train_batch_size 1 --paths recipe    80 GB
    python sft/bench.py --use_peft false --num_layers 1 3 --per_device_train_batch_size 1
                                                          all weights, scaled to all layers
    python sft/bench.py --paths recipe no_packing compiled      what one lever is worth
    python sft/bench.py --tiny                            small shapes and few steps, for a CPU

A path (finetune/benchmark/variants.py lists them all) is an SFTTrainer with LoRA r=8 on q, k, v,
o and both projections of every expert (--use_peft false: all weights are trained). Every path
trains on the same random conversations, in a process of its own:

    recipe         rows packed to max_length, grouped LoRA beside experts in MXFP4, the fastest
                   attention that is right on this machine, saving in the background
    stock          TRL's defaults: padded batches, PEFT's own LoRA on bf16 experts, eager attention
    stock_packed   stock with TRL's packing: as many tokens a step as the recipe

recipe : stock is what a user gains at the same flags. Their steps differ in tokens: a batch of the
recipe holds full rows, one of stock as many conversations. recipe : stock_packed compares equal
numbers of tokens a step. There, eager attention lets the conversations of a row see each other, and
its memory grows with the square of all tokens: give it --per_device_train_batch_size 1.

A path that fails keeps its column in the table, with the reason. If only a part of it fails
(saving, or the timing of attention, experts or loss), the other figures are there.

With --use_peft false, accelerate trains all weights with fsdp2.yaml on one GPU: fp32 weights,
gradients and AdamW states, computing in bf16 (16 bytes a parameter: 3 layers of 20b on 80 GB).
Given two numbers of layers, bench.py takes each time as a fixed part plus a part per layer and
scales it to all layers. Let the two differ by an even number, so that sliding and full attention
have equal shares. Communication between GPUs is not measured: roofline.py estimates it.

Widths, vocabulary and routing are gpt-oss's; the weights are random. Lengths are lognormal with
the mean of the default dataset (finetune/benchmark/synthetic.py). tokens/s does not count padding.
MFU is the FLOPs of finetune/model/flops.py over the GPU's dense bf16 peak. Windows of some steps
are timed after a warm-up; the table has their median.
"""

import json
import sys
import tempfile
from argparse import SUPPRESS, Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune.benchmark.options import TINY_DEFAULTS, BenchArguments
from finetune.benchmark.process import exit_on_signals, run_to_end
from finetune.benchmark.results import ARGUMENTS, label, read_report, table
from finetune.benchmark.variants import PATHS
from finetune.command_line import CommandLine
from finetune.errors import UserError, one_line_errors


def parse(argv: list[str]) -> tuple[BenchArguments, Namespace]:
    """The flags. --tiny changes the defaults of some, not the values that are given."""
    parser = CommandLine(BenchArguments, description=__doc__)
    # The process of one path is this script again, with a folder that holds its arguments.
    parser.add_argument("--measure_in", type=Path, help=SUPPRESS)
    args, rest = parser.parse_args_into_dataclasses(argv)
    if args.tiny:
        parser.set_defaults(**TINY_DEFAULTS)
        args, rest = parser.parse_args_into_dataclasses(argv)
    return args, rest


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


def main(args: BenchArguments) -> None:
    check(args)
    exit_on_signals()
    report: dict[str, Any] = {"device": None, "torch": None, "args": asdict(args), "results": []}
    for path in args.paths:
        measure_path(args, path, report)
        if args.output:  # after every path: an interrupted benchmark keeps those it has measured
            Path(args.output).write_text(json.dumps(report, indent=2))
    print(table(report["results"]))
    if not any("tokens_per_sec" in result for result in report["results"]):
        sys.exit(1)


def measure_path(args: BenchArguments, path: str, report: dict[str, Any]) -> None:
    """Add a path's results to the report: one for each number of layers, and the scaled one."""
    counts: list[int | None] = [*args.num_layers] or [None]
    results = []
    for count in counts:
        one = replace(args, paths=[path], num_layers=[] if count is None else [count])
        measured = measure_apart(one, name=label(path, count))
        report |= {name: measured[name] for name in ("device", "torch") if measured[name]}
        results.append(measured["result"])
    if len(results) == 2:
        # Imported here: it takes eight seconds, and the parent needs it for scaled figures only.
        from finetune.benchmark.scale import scale

        results.append(scale(args, path, *results))
    report["results"] += results


def measure_apart(args: BenchArguments, *, name: str) -> dict[str, Any]:
    """Measure one path in a process of its own, started as the recipe starts train.py."""
    launcher = [sys.executable]
    if not args.use_peft:
        config = Path(__file__).with_name("fsdp2.yaml")
        launcher += ["-m", "accelerate.commands.launch", f"--config_file={config}"]
        launcher += ["--num_machines=1", "--num_processes=1", "--main_process_port=0"]
    print(f"{name}: starts", file=sys.stderr, flush=True)
    # The folder belongs to this process, so that a path that is killed leaves no checkpoint behind.
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / ARGUMENTS).write_text(json.dumps(asdict(args)))
        status = run_to_end([*launcher, __file__, "--measure_in", temporary])
        report = read_report(folder, name=name, status=status)
    failed = report["result"].get("failed")
    end = f"failed: {failed}" if failed else "measured"
    print(f"{name}: {end}", file=sys.stderr, flush=True)
    return report


if __name__ == "__main__":
    with one_line_errors():
        arguments, rest = parse(sys.argv[1:])
        if rest.measure_in:
            # Imported here: only the process of a path needs torch, which takes seconds to import.
            from finetune.benchmark.measure import measure_in

            measure_in(rest.measure_in)
        else:
            main(arguments)
