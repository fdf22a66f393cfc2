"""What bounds a step of each recipe, on paper: computing, or moving weights and gradients.

    python sft/roofline.py gpt-oss-*.yaml                  as the task files have it
    python sft/roofline.py --mfu 0.3 gpt-oss-20b-sft.yaml  with the MFU that bench.py measured

FSDP2 gathers a layer's bf16 weights before its forward and again before its backward. The embedding
is gathered twice as well, the head once. Gradients are reduced in fp32; data parallel LoRA reduces
the adapter's only. The next layer's weights travel while a layer computes, so that a step takes the
longer of the two sums.

A collective of B bytes over W GPUs moves B (W - 1) / W through every GPU's link. Between nodes,
NCCL's rings share all network cards of a node, so the time there is B over the sum of the cards'
bandwidths (the "bus bandwidth" of nccl-tests). A frozen base in MXFP4 is unpacked for the forward,
for its recomputation and for the backward.

As the task files have it, at an MFU of 30%: gpt-oss-20b-lora is bound by computing,
gpt-oss-120b-lora by unpacking its base, and both full recipes by moving weights and gradients.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.command_line import CommandLine


@dataclass
class RooflineArguments:
    """How fast a GPU computes."""

    mfu: float = field(
        default=0.3,
        metadata={"help": "The MFU of one GPU alone, 0 to 1, as bench.py measures it."},
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
from finetune.benchmark.synthetic import MEAN_LENGTH, config_of
from finetune.benchmark.traffic import bytes_between_gpus, bytes_unpacked, count_parameters
from finetune.errors import UserError, one_line_errors
from finetune.model.flops import PEAK_FLOPS, flops_per_token
from finetune.task_file import TaskFile

# Bytes/s in each direction, from data sheets: NVLink 4 of a GPU; eight 400 Gb/s cards of a node. A
# ring reaches about four fifths of that (all_gather_perf of nccl-tests on such machines).
NVLINK, NETWORK, REACHED = 450e9, 8 * 50e9, 0.8
HBM = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s of a GPU's memory, from data sheets


@dataclass(frozen=True)
class Step:
    """What one step of a task takes on each GPU, in seconds. tokens: at once on a GPU."""

    tokens: int
    tokens_of_all_gpus: int  # with gradient accumulation
    computing: float
    unpacking: float
    moving: float

    @property
    def seconds(self) -> float:
        return max(self.computing + self.unpacking, self.moving)

    @property
    def bound(self) -> str:
        """What takes longest."""
        if self.moving == self.seconds:
            return "moving"
        return "unpacking" if self.unpacking > self.computing else "computing"

    @property
    def tokens_to_balance(self) -> float:
        """From how many tokens at once computing takes longer than moving."""
        return self.moving / (self.computing / self.tokens)


def step_of(path: Path, *, mfu: float) -> Step:
    """Raises UserError if the file is no task file, or its step cannot be told from it."""
    task = TaskFile.read(path)
    config = parse_task(task)
    gpu, training = gpu_of(task), config.training
    if training.max_length is None:
        raise UserError(f"{path}: the length of a row is not known without --max_length")
    tokens = training.max_length * training.per_device_train_batch_size
    model, lora = config_of(config.model_id), config.model.use_peft
    flops = tokens * flops_per_token(model, context=MEAN_LENGTH, lora=lora)
    parameters = count_parameters(model, config.model)
    moved = bytes_between_gpus(parameters, sharded=task.is_sharded, lora=lora)
    links = min(NVLINK, NETWORK) if task.num_nodes > 1 else NVLINK
    unpacked = 0 if config.run.dequantize else bytes_unpacked(model)
    return Step(
        tokens=tokens,
        tokens_of_all_gpus=tokens * training.gradient_accumulation_steps * task.num_gpus,
        computing=flops / (PEAK_FLOPS[gpu] * mfu),
        unpacking=unpacked / (HBM[gpu] * REACHED),
        moving=moved * (task.num_gpus - 1) / task.num_gpus / (links * REACHED),
    )


def gpu_of(task: TaskFile) -> str:
    """The data sheet's name of the task's GPU, for example H100 of H100-SXM.

    Raises UserError if there is no data sheet of it here.
    """
    known = HBM.keys() & PEAK_FLOPS.keys()
    found = [name for name in sorted(known) if name in task.accelerator]
    if not found:
        raise UserError(
            f"the speed of {task.accelerator} is not known here, but of {', '.join(sorted(known))}"
        )
    return found[0]


def main(args: RooflineArguments, paths: list[Path]) -> None:
    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu {args.mfu:g}: give a share of the GPU's peak, above 0 and up to 1")
    table = Table(
        "",
        "tokens at once\nper GPU",
        "computing\ns",
        "unpacking\ns",
        "moving\ns",
        "bound by",
        "tokens/s/GPU\nat most",
        "computing takes\nover at tokens",
        "tokens\na step",
        title=f"On paper, computing at an MFU of {args.mfu:.0%}",
    )
    for path in paths:
        step = step_of(path, mfu=args.mfu)
        table.add_row(
            path.stem,
            f"{step.tokens:,}",
            f"{step.computing:.3f}",
            f"{step.unpacking:.3f}",
            f"{step.moving:.3f}",
            step.bound,
            f"{step.tokens / step.seconds:,.0f}",
            f"{step.tokens_to_balance:,.0f}",
            f"{step.tokens_of_all_gpus:,}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    with one_line_errors():
        main(arguments, rest.tasks)
