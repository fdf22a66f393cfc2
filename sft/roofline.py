"""What bounds a step of each recipe, on paper: computing, or moving weights and gradients.

    python sft/roofline.py gpt-oss-*.yaml                  as the task files have it
    python sft/roofline.py --mfu 0.3 gpt-oss-20b-sft.yaml  with the rate bench.py measured

FSDP2 gathers a layer's bf16 weights before its forward and again before its backward (so with the
embedding; the head, once), and reduces its fp32 gradients; data parallel LoRA reduces the
adapter's. While one layer computes the next travels, so a step takes the longer of the
two sums. A collective of B bytes over W GPUs moves B (W - 1) / W through every GPU's link; over
nodes NCCL's rings share all of a node's network cards, so B over their sum is the time there (the
"bus bandwidth" of nccl-tests). A frozen base in MXFP4 is unpacked for the forward, for its
recomputation and for the backward, each time read as 17/32 of a byte a weight and written as two.

As the task files have it, at an MFU of 30%: gpt-oss-20b-lora is bound by computing,
gpt-oss-120b-lora by unpacking its base, both full recipes by moving weights and gradients.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.command_line import CommandLine


@dataclass
class RooflineArguments:
    """Which recipes, and how fast a GPU computes."""

    mfu: float = field(
        default=0.3, metadata={"help": "What one GPU reaches alone: bench.py measures it."}
    )


def command_line() -> CommandLine:
    parser = CommandLine(RooflineArguments, description=__doc__)
    parser.add_argument("tasks", nargs="+", type=Path, help="task files")
    return parser


if __name__ == "__main__":
    arguments, rest = command_line().parse_args_into_dataclasses()  # before imports that take 8 s

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table
from transformers import GptOssConfig

from finetune.arguments import parse_args
from finetune.benchmark.synthetic import MEAN_LENGTH, config_of
from finetune.errors import UserError, one_line_errors
from finetune.model.flops import PEAK_FLOPS, flops_per_token
from finetune.task_file import TaskFile

# Bytes/s each way, data sheets: NVLink 4 of a GPU, eight 400 Gb/s cards of a node. A ring gets some
# four fifths of them (nccl-tests' all_gather_perf on such machines).
NVLINK, NETWORK, REACHED = 450e9, 8 * 50e9, 0.8
HBM = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s, data sheets


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: of all decoder layers, the embedding, the head, and the adapter."""

    layers: int
    embedding: int
    head: int
    adapter: int

    @property
    def model(self) -> int:
        return self.layers + self.embedding + self.head


def count_parameters(config: GptOssConfig, *, lora_r: int) -> Parameters:
    """Of a model, and of LoRA on every linear layer of its decoder and every expert."""
    hidden, width, num_experts = (
        config.hidden_size,
        config.intermediate_size,
        config.num_local_experts,
    )
    q_dim = config.num_attention_heads * config.head_dim
    kv_dim = config.num_key_value_heads * config.head_dim
    attention = hidden * (2 * q_dim + 2 * kv_dim) + q_dim + 2 * kv_dim + hidden
    experts = num_experts * (3 * hidden * width + 2 * width + hidden)
    router, norms_and_sinks = num_experts * (hidden + 1), 2 * hidden + config.num_attention_heads
    layer = attention + experts + router + norms_and_sinks
    thin = 2 * (hidden + q_dim) + 2 * (hidden + kv_dim)  # inputs and outputs, what r multiplies
    thin += num_experts * (hidden + 2 * width + width + hidden)
    return Parameters(
        layers=config.num_hidden_layers * layer,
        embedding=config.vocab_size * hidden,
        head=config.vocab_size * hidden + hidden,
        adapter=config.num_hidden_layers * lora_r * thin,
    )


def bytes_moved(parameters: Parameters, *, sharded: bool, lora: bool, weight_bytes: int = 2) -> int:
    """Bytes of all collectives of a step, before the factor (W - 1) / W. Gradients are fp32.

    An all-reduce counts twice: it is a reduce-scatter and an all-gather.
    """
    adapter = parameters.adapter if lora else 0
    trainable = adapter if lora else parameters.model
    if not sharded:
        return 2 * 4 * trainable
    gathered = 2 * (parameters.layers + parameters.embedding + adapter) + parameters.head
    return weight_bytes * gathered + 4 * trainable


def bytes_unpacked(config: GptOssConfig) -> int:
    """Bytes read and written in a step to unpack all experts."""
    a_layer = 3 * config.num_local_experts * config.hidden_size * config.intermediate_size
    return 3 * config.num_hidden_layers * a_layer * (17 + 64) // 32


def add_row(table: Table, path: Path, *, mfu: float) -> None:
    task = TaskFile.read(path)
    config = parse_args([*task.flags, "--use_cpu=true"])
    gpu, max_length = gpu_of(task), config.training.max_length
    if max_length is None:
        raise UserError(f"{path}: the length of a row is not known without --max_length")
    tokens = max_length * config.training.per_device_train_batch_size
    model, lora = config_of(config.model_id), config.model.use_peft
    parameters = count_parameters(model, lora_r=config.model.lora_r)

    per_token = flops_per_token(model, context=MEAN_LENGTH, lora=lora) / (PEAK_FLOPS[gpu] * mfu)
    computing = per_token * tokens
    moved = bytes_moved(parameters, sharded=task.is_sharded, lora=lora)
    links = min(NVLINK, NETWORK) if task.num_nodes > 1 else NVLINK
    moving = moved * (task.num_gpus - 1) / task.num_gpus / (links * REACHED)
    unpacking = 0.0 if config.run.dequantize else bytes_unpacked(model) / (HBM[gpu] * REACHED)
    step = max(computing + unpacking, moving)
    parts = {"computing": computing, "unpacking": unpacking}
    bound = "moving" if moving == step else max(parts, key=lambda part: parts[part])
    accumulated = config.training.gradient_accumulation_steps
    table.add_row(
        path.stem,
        f"{tokens:,}",
        f"{computing:.2f}",
        f"{unpacking:.2f}",
        f"{moving:.2f}",
        bound,
        f"{tokens / step:,.0f}",
        f"{moving / per_token:,.0f}",
        f"{tokens * accumulated * task.num_gpus:,}",
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
        add_row(table, path, mfu=args.mfu)
    Console(width=140).print(table)


if __name__ == "__main__":
    with one_line_errors():
        main(arguments, rest.tasks)
