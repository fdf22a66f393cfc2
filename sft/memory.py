"""How much GPU memory a step takes, counted tensor by tensor on a machine without a GPU.

    python sft/memory.py gpt-oss-*-lora.yaml                     as the task files have it
    python sft/memory.py gpt-oss-120b-sft.yaml                   all weights, under FSDP2
    python sft/memory.py --max_length 2048 gpt-oss-20b-lora.yaml

A step of the task's model is run in its true shapes without any values, and every tensor counts
from the operation that makes it until it is freed (finetune/benchmark/memory_count.py). A kernel
counts as what it leaves behind: attention saves q, k, v, its output and the log-sum-exp of its
scores. The peak is that of a second step, when gradients and AdamW's states are there. Not counted:
CUDA's context, and memory that its allocator cannot fill.

TRL's fused head never holds all logits, which for 4,096 tokens would take 1.6 GB in bf16. It holds
a tile of 4,096 tokens x 32,768 of the vocabulary in bf16 (256 MiB) and the fp32 gradient of the
hidden states (47 MB). A head that is trained adds its fp32 gradient, 2.3 GB.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.command_line import CommandLine


@dataclass
class MemoryArguments:
    """What differs from the task file."""

    max_length: str | None = field(
        default=None, metadata={"help": "Tokens of a row. 65536,131072 gives a column for each."}
    )
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "The most rows at once on a GPU."}
    )
    global_batch_size: int | None = field(
        default=None, metadata={"help": "Rows of a step, on all GPUs together."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "The rank of the adapter."})
    activation_offloading: bool | None = field(
        default=None, metadata={"help": "Whether the host holds what backward needs of a layer."}
    )
    dequantize: bool | None = field(
        default=None, metadata={"help": "Whether the base is in bf16 instead of MXFP4."}
    )


def command_line() -> CommandLine:
    parser = CommandLine(MemoryArguments, description=__doc__)
    parser.add_argument("tasks", nargs="+", type=Path, help="task files")
    return parser


if __name__ == "__main__":
    arguments, rest = command_line().parse_args_into_dataclasses()  # before imports that take 8 s

from rich.console import Console
from rich.table import Table

from finetune.arguments import parse_task
from finetune.benchmark.memory_count import count
from finetune.benchmark.sharded_count import count_sharded
from finetune.benchmark.synthetic import config_of
from finetune.errors import UserError, one_line_errors
from finetune.task_file import TaskFile


def count_task(
    path: Path, args: MemoryArguments, max_length: str | None
) -> tuple[str, dict[str, int]]:
    """A title and the bytes of a task file's step. Raises UserError if it cannot be counted."""
    task = TaskFile.read(path)
    changed = {**vars(args), "max_length": max_length}
    changes = [f"--{name}={value}" for name, value in changed.items() if value is not None]
    config = parse_task(task, *changes)
    training, lora_r, dequantize = config.training, config.model.lora_r, config.run.dequantize
    is_fsdp = task.accelerate_config["distributed_type"] == "FSDP"
    if is_fsdp and training.activation_offloading:
        raise UserError(f"{path}: --activation_offloading is counted for LoRA only")
    if is_fsdp == config.model.use_peft or (task.is_sharded and not is_fsdp):
        raise UserError(
            f"{path}: only LoRA beside a base that every GPU holds is counted, and all weights "
            "shared out by FSDP2"
        )
    length, batch_size = training.max_length, training.per_device_train_batch_size
    if length is None:
        raise UserError(f"{path}: the length of a row is not known without --max_length")
    if min(length, batch_size, lora_r) < 1:
        raise UserError(
            f"{path}: --max_length {length}, --per_device_train_batch_size {batch_size} and "
            f"--lora_r {lora_r} must be at least 1"
        )
    shape = f"{batch_size} x {length} tokens"
    if is_fsdp:
        held = count_sharded(
            config_of(config.model_id),
            num_gpus=task.num_gpus,
            max_length=length,
            batch_size=batch_size,
            activation_checkpointing=training.activation_checkpointing,
        )
        return f"{path.stem}\n{shape}\n{task.num_gpus} GPUs", held
    held = count(
        config_of(config.model_id),
        config.model,
        max_length=length,
        batch_size=batch_size,
        packed=not dequantize,
        activation_checkpointing=training.activation_checkpointing,
        activation_offloading=training.activation_offloading,
    )
    return f"{path.stem}\n{shape}, r={lora_r}\nexperts in {'bf16' if dequantize else 'MXFP4'}", held


def main(args: MemoryArguments, paths: list[Path]) -> None:
    lengths = args.max_length.split(",") if args.max_length else [None]
    columns = [count_task(path, args, length) for path in paths for length in lengths]
    table = Table("GiB", *(title for title, _ in columns), title="A GPU's memory, counted")
    for name in dict.fromkeys(name for _, held in columns for name in held):
        cells = (f"{held[name] / 2**30:.2f}" if name in held else "" for _, held in columns)
        table.add_row(name, *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    with one_line_errors():
        main(arguments, rest.tasks)
