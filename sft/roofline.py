"""What bounds a step of each recipe: the least time of every part of it, counted without a GPU.

    python sft/roofline.py gpt-oss-*.yaml                       as the task files have it
    python sft/roofline.py --gpu H200 gpt-oss-120b-lora.yaml
    python sft/roofline.py --global_batch_size 32 gpt-oss-20b-sft.yaml
    python sft/roofline.py --unpacks_in_product true gpt-oss-120b-lora.yaml

The operations of a microbatch's forward and backward are run without any values and counted one by
one (finetune/benchmark/op_count.py). Each takes at least its FLOPs over 800 TFLOP/s of H100's 989,
or its bytes over the bandwidth of the GPU's memory, whichever is longer. Moving between GPUs,
FSDP2's copies and the optimizer follow from the numbers of parameters (finetune/benchmark/step.py).

A bound is not a forecast: real kernels stay behind it, and the time of launches and host waits is
not in it. Launches are counted, but those of the optimizer are not. Nor are the seven waits that
TRL's metrics and Trainer's check of the loss add to a microbatch.

As the task files have it, gpt-oss-20b-lora and gpt-oss-20b-sft are bound by their products with
the experts' weights, gpt-oss-120b-lora by unpacking its base, and gpt-oss-120b-sft by moving
weights and gradients.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.command_line import CommandLine


@dataclass
class RooflineArguments:
    """What differs from the task file."""

    gpu: str | None = field(default=None, metadata={"help": "A100, H100, H200 or B200."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a row."})
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "The most rows at once on a GPU."}
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of a step, on all GPUs together."}
    )
    unpacks_in_product: bool = field(
        default=False,
        metadata={
            "help": "Count experts in MXFP4 as unpacked on their way into the products, which "
            "training chooses where it proves right and faster."
        },
    )


def command_line() -> CommandLine:
    parser = CommandLine(RooflineArguments, description=__doc__)
    parser.add_argument("tasks", nargs="+", type=Path, help="task files")
    return parser


if __name__ == "__main__":
    arguments, rest = command_line().parse_args_into_dataclasses()  # before imports that take 8 s

from rich.console import Console
from rich.table import Table

from finetune.arguments import parse_task
from finetune.benchmark.gpus import gpu_named
from finetune.benchmark.step import MOVING, Step, count_step
from finetune.errors import UserError, one_line_errors
from finetune.task_file import TaskFile


def count_file(path: Path, args: RooflineArguments) -> Step:
    """Raises UserError if the file is no task file, or its step cannot be told from it."""
    task = TaskFile.read(path)
    for name in ("max_length", "per_device_train_batch_size", "global_batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    ours = ("gpu", "unpacks_in_product")
    flags = {name: value for name, value in vars(args).items() if name not in ours}
    changes = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    config = parse_task(task, *changes)
    gpu = gpu_named(args.gpu or task.accelerator)
    return count_step(task, config, gpu=gpu, unpacks_in_product=args.unpacks_in_product)


def rows_of(steps: list[Step]) -> dict[str, list[str]]:
    """The rows of the table, a cell for each step; times are in milliseconds."""
    parts = dict.fromkeys(part for step in steps for part in step.parts)
    return {
        "GPU": [step.gpu.name for step in steps],
        "tokens at once": [f"{step.tokens:,}" for step in steps],
        **{part: [milliseconds(step.seconds_of(part)) for step in steps] for part in parts},
        "forward and backward": [milliseconds(step.microbatch.seconds) for step in steps],
        "times a step": [str(step.accumulation) for step in steps],
        "clipping and AdamW": [milliseconds(step.optimizer) for step in steps],
        "all computing of a step": [milliseconds(step.computing) for step in steps],
        MOVING: [milliseconds(step.moving) for step in steps],
        "bound by": [step.bound.partition(":")[0] for step in steps],
        "tokens/s/GPU at most": [f"{step.tokens_per_sec:,.0f}" for step in steps],
        "MFU at most": [f"{step.mfu:.0%}" for step in steps],
        "kernel launches": [f"{step.microbatch.launches:,.0f}" for step in steps],
        "host waits": [f"{step.microbatch.waits:,.0f}" for step in steps],
    }


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f}" if seconds else ""


def main(args: RooflineArguments, paths: list[Path]) -> None:
    steps = [count_file(path, args) for path in paths]
    table = Table("ms", *(path.stem for path in paths), title="A step at its fastest, counted")
    for name, cells in rows_of(steps).items():
        table.add_row(name, *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    with one_line_errors():
        main(arguments, rest.tasks)
