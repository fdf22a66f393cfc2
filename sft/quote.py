"""What a run will take and cost, before anything is rented.

    python sft/quote.py --dataset my.jsonl --tokenizer openai/gpt-oss-20b \\
        --sky .venv/sky/bin/python gpt-oss-20b-lora.yaml

`make quote TASK=... DATASET=...` calls it. Tokens and steps are counted with the data itself, as
train.py reads it. Hours come from the rate that --tokens_per_sec_per_gpu gives, measured by
bench.py or by a short run. Without one they are a range: a step's lower bound (roofline.py), of
which a real step is assumed to reach between 25% and 60%. Prices are those of SkyPilot's catalog;
without --sky, or where no catalog can be had, everything but dollars is printed.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.command_line import CommandLine


@dataclass
class QuoteArguments:
    """The data, where prices come from, and what is assumed."""

    dataset: str = field(
        metadata={"help": "The dataset, written like DATASET in a task file: a file or a hub name."}
    )
    tokenizer: str = field(
        metadata={"help": "The hub name or the folder of a model, or of its tokenizer alone."}
    )
    sky: str | None = field(
        default=None, metadata={"help": "The Python of SkyPilot's environment (make sky)."}
    )
    clouds: list[str] = field(
        default_factory=lambda: ["aws", "gcp", "azure", "lambda", "nebius"],
        metadata={
            "help": "The clouds to ask, by their names in SkyPilot. By default those that rent "
            "such GPUs and can mount a bucket."
        },
    )
    tokens_per_sec_per_gpu: float | None = field(
        default=None, metadata={"help": "A rate that was measured on the recipe's own GPU."}
    )
    startup_minutes: float = field(
        default=15.0,
        metadata={"help": "From the launch until training begins: an assumption, not measured."},
    )
    interrupted_every_hours: float = field(
        default=4.0, metadata={"help": "How often a spot machine is taken back: an assumption."}
    )


def command_line() -> CommandLine:
    parser = CommandLine(QuoteArguments, description=__doc__)
    parser.add_argument("tasks", nargs="+", type=Path, help="task files")
    return parser


if __name__ == "__main__":
    arguments, rest = command_line().parse_args_into_dataclasses()  # before imports that take 8 s

import json
import shlex
import subprocess
from dataclasses import replace
from datetime import date
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from finetune.arguments import Config, parse_task
from finetune.benchmark.gpus import gpu_named
from finetune.benchmark.memory_count import count
from finetune.benchmark.money import Interruptions, cheapest, checkpoint_bytes
from finetune.benchmark.op_count import Cost
from finetune.benchmark.step import count_parts, step_of
from finetune.benchmark.synthetic import config_of
from finetune.benchmark.traffic import Parameters, count_parameters
from finetune.data.dataset import count_tokens, load_datasets
from finetune.data.sources import parse_sources
from finetune.errors import UserError, one_line_errors
from finetune.model.loading import load_tokenizer
from finetune.task_file import TaskFile
from finetune.training.num_steps import (
    few_steps,
    num_training_steps,
    sequences_of,
    sequences_per_step,
)

PRICES = Path(__file__).parent / "finetune/benchmark/prices.py"
REACHED = (0.6, 0.25)  # of a step's lower bound: the best and the worst that is assumed
WIDTH = 132


def main(args: QuoteArguments, paths: list[Path]) -> None:
    check(args)
    console = Console(width=WIDTH, highlight=False)
    tokenizer = load_tokenizer(args.tokenizer)
    for path in paths:
        quote(console, path, args, tokenizer)


def check(args: QuoteArguments) -> None:
    """Raise UserError for numbers that mean nothing."""
    for name in ("tokens_per_sec_per_gpu", "startup_minutes", "interrupted_every_hours"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} {value} must be a number above 0")


def quote(
    console: Console, path: Path, args: QuoteArguments, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Print what one task takes and costs. Raises UserError if that cannot be told."""
    task = TaskFile.read(path)
    config = parse_task(task, f"--dataset_name={args.dataset}")
    sequences, tokens = count_epoch(config, tokenizer)
    parameters = count_parameters(config_of(config.model_id), config.model)
    num_steps = num_training_steps(sequences, config.training, num_gpus=task.num_gpus)
    console.print(run_table(task, config, parameters, num_steps=num_steps, tokens=tokens))

    prices = read_prices(args, task)
    counted: dict[tuple[str, int], dict[str, Cost]] = {}
    choices = [choice_of(task, name, args, sequences, counted) for name in task.choices]
    rows = [row for choice in choices for row in offers_of(choice, prices["offers"], task, args)]
    console.print(offer_table(rows, args))
    console.print(uploads(choices, config, parameters))
    for choice in choices:
        if "problem" in choice:
            console.print(f"{choice['accelerators']} is left out: {choice['problem']}")
    for cloud, reason in prices["failed"].items():
        console.print(f"no prices of {cloud}: {reason}")
    for spot in (False, True):
        row = cheapest(rows, "spot_dollars" if spot else "dollars")
        if row is not None:
            console.print(launch_line(task, row, args, spot=spot), soft_wrap=True)
    for file in elsewhere(args.dataset):
        console.print(f"first: cp {shlex.quote(file)} sft/, for the node has what is in sft/")


def count_epoch(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The rows of an epoch, packed where the task packs, and its tokens, as train.py counts."""
    data_args = config.data
    if not data_args.conversation_start_date:
        data_args = replace(data_args, conversation_start_date=date.today().isoformat())
    train, _ = load_datasets(config.script, config.training, data_args, tokenizer)
    return len(sequences_of(train, config.training)), count_tokens(train)


def run_table(
    task: TaskFile, config: Config, parameters: Parameters, *, num_steps: int, tokens: int
) -> Table:
    """What the run is, whatever it runs on."""
    lora = config.model.use_peft
    table = Table(show_header=False, title=task.name)
    table.add_row("tokens an epoch", f"{tokens:,}")
    table.add_row("optimizer steps", f"{num_steps:,}")
    if warning := few_steps(num_steps):
        table.add_row("warning", warning)
    table.add_row("memory of a GPU", memory_of(task, config, parameters))
    size = checkpoint_bytes(parameters, lora=lora)
    table.add_row(
        "a checkpoint",
        f"{size / 1e9:,.1f} GB to upload, at most every {config.run.save_every_minutes:g} minutes",
    )
    return table


def memory_of(task: TaskFile, config: Config, parameters: Parameters) -> str:
    """The count where there is one, or else arithmetic; both say so."""
    training = config.training
    if config.model.use_peft and not task.is_sharded and training.max_length:
        held = count(
            config_of(config.model_id),
            config.model,
            max_length=training.max_length,
            batch_size=training.per_device_train_batch_size,
            packed=not config.run.dequantize,
            activation_checkpointing=training.activation_checkpointing,
        )
        return f"{held['peak'] / 2**30:.1f} GiB, counted, and CUDA's own"
    # Weights, gradients and AdamW's two states, all in fp32.
    shard = 16 * parameters.model / task.num_gpus
    return f"{shard / 2**30:.0f} GiB on each of {task.num_gpus}, arithmetic, and activations"


def uploads(choices: list[dict[str, Any]], config: Config, parameters: Parameters) -> str:
    """What the checkpoints come to on the task's first choice of GPUs."""
    size = checkpoint_bytes(parameters, lora=config.model.use_peft) / 1e9
    hours = next((choice["hours"] for choice in choices if "hours" in choice), [0.0])
    saves = [int(60 * span / config.run.save_every_minutes) + 1 for span in hours]
    return f"uploads: {as_range([size * number for number in saves])} GB of checkpoints at most"


def choice_of(
    task: TaskFile,
    accelerators: str,
    args: QuoteArguments,
    sequences: int,
    counted: dict[tuple[str, int], dict[str, Cost]],
) -> dict[str, Any]:
    """Hours on one of the task's choices of GPUs: at best and at worst, or why it cannot run.

    counted: what a microbatch costs by the GPU's name and the rows at once, filled here, for a
    count takes seconds.
    """
    chosen = task.on(accelerators)
    try:
        config = parse_task(chosen, f"--dataset_name={args.dataset}")
        hours = hours_of(chosen, config, args, sequences, counted)
    except UserError as error:
        return {"accelerators": accelerators, "num_nodes": task.num_nodes, "problem": str(error)}
    return {
        "accelerators": accelerators,
        "num_nodes": task.num_nodes,
        "hours": hours,
        "minutes": config.run.save_every_minutes,
    }


def hours_of(
    task: TaskFile,
    config: Config,
    args: QuoteArguments,
    sequences: int,
    counted: dict[tuple[str, int], dict[str, Cost]],
) -> list[float]:
    """Hours of training on these GPUs, at best and at worst. Raises UserError if the step cannot be
    counted. counted: as in choice_of.
    """
    training = config.training
    num_steps = num_training_steps(sequences, training, num_gpus=task.num_gpus)
    rate = args.tokens_per_sec_per_gpu
    if rate is not None and training.max_length:
        rows = sequences_per_step(training, num_gpus=1)
        return [num_steps * rows * training.max_length / rate / 3600] * 2
    gpu = gpu_named(task.accelerator)
    key = gpu.name, training.per_device_train_batch_size
    if key not in counted:
        counted[key] = count_parts(task, config, gpu)
    step = step_of(task, config, gpu, counted[key])
    return [num_steps * step.seconds / reached / 3600 for reached in REACHED]


def offers_of(
    choice: dict[str, Any], offers: list[dict[str, Any]], task: TaskFile, args: QuoteArguments
) -> list[dict[str, Any]]:
    """A row for each offer of a choice, or one without prices. Dollars are those at worst."""
    matching = [offer for offer in offers if offer["accelerators"] == choice["accelerators"]]
    return [with_dollars(choice | offer, task, args) for offer in matching or [{}]]


def with_dollars(row: dict[str, Any], task: TaskFile, args: QuoteArguments) -> dict[str, Any]:
    """The row with the dollars of all nodes, on demand and on spot: [at best, at worst]."""
    row |= dict.fromkeys(("dollars", "dollars_range", "spot_dollars", "spot_dollars_range"))
    if "problem" in row:
        return row
    spot = Interruptions(
        every=60 * args.interrupted_every_hours,
        startup=args.startup_minutes,
        between_saves=row["minutes"],
    )
    startup = args.startup_minutes / 60
    if row.get("price"):
        row["dollars_range"] = [
            task.num_nodes * row["price"] * (hours + startup) for hours in row["hours"]
        ]
        row["dollars"] = row["dollars_range"][-1]
    if row.get("spot_price"):
        row["spot_dollars_range"] = [
            task.num_nodes * row["spot_price"] * (hours + startup + spot.hours(hours))
            for hours in row["hours"]
        ]
        row["spot_dollars"] = row["spot_dollars_range"][-1]
    return row


def offer_table(rows: list[dict[str, Any]], args: QuoteArguments) -> Table:
    """One line for each offer."""
    measured = args.tokens_per_sec_per_gpu is not None
    table = Table(
        "GPUs of a node",
        "cloud, region",
        "$ an hour\non demand",
        "on spot",
        "hours of\ntraining",
        "$ on demand",
        f"$ on spot, taken back\nevery {args.interrupted_every_hours:g} hours",
        title="at the rate that was given" if measured else "hours are a range, not measured",
    )
    for row in rows:
        if "problem" in row:
            continue
        table.add_row(
            row["accelerators"],
            f"{row['cloud']}, {row['region']}" if "cloud" in row else "no offer found",
            dollars(row.get("price"), row["num_nodes"]),
            dollars(row.get("spot_price"), row["num_nodes"]),
            hours_range(row["hours"]),
            as_range(row["dollars_range"], unit="$"),
            as_range(row["spot_dollars_range"], unit="$"),
        )
    return table


def dollars(price: float | None, num_nodes: int) -> str:
    """The price of an hour of all nodes."""
    return f"${price * num_nodes:,.2f}" if price else "-"


def as_range(values: list[float] | None, *, unit: str = "") -> str:
    """Two numbers, or one where they read alike."""
    if values is None:
        return "-"
    texts = [f"{unit}{value:,.0f}" if value >= 100 else f"{unit}{value:,.2f}" for value in values]
    return " to ".join(dict.fromkeys(texts))


def hours_range(values: list[float]) -> str:
    """The same of hours, with two digits that count where they are minutes or seconds."""
    if max(values) >= 1:
        return as_range(values)
    return " to ".join(dict.fromkeys(f"{value:.2g}" for value in values))


def launch_line(task: TaskFile, row: dict[str, Any], args: QuoteArguments, *, spot: bool) -> str:
    """The command that rents this offer; on spot as a managed job, which SkyPilot restarts."""
    region = row["spot_region" if spot else "region"]
    price = row["spot_price" if spot else "price"] * task.num_nodes
    words = ["sky", "jobs", "launch", "--use-spot"] if spot else ["sky", "launch", "-c", task.name]
    words += [f"{task.name}.yaml", "--infra", f"{row['cloud']}/{region}"]
    words += ["--gpus", row["accelerators"]]
    words += ["--env", f"DATASET={on_the_node(args.dataset)}"]
    words += ["--env", f"PRICE_PER_HOUR={price:.2f}"]
    return f"{shlex.join(words)} --env CHECKPOINT_BUCKET=s3://<your bucket>"


def elsewhere(dataset: str) -> list[str]:
    """The files of this machine that are not in sft/, and so not on the node."""
    names = [source.name for source in parse_sources(dataset)]
    return [name for name in names if Path(name).exists() and not name.startswith("sft/")]


def on_the_node(dataset: str) -> str:
    """The dataset's name there: what lies in sft/ here is in /sft; other names stay as they are."""
    copied, sources = elsewhere(dataset), []
    for source in parse_sources(dataset):
        name = f"sft/{Path(source.name).name}" if source.name in copied else source.name
        place = f"/{name}" if name.startswith("sft/") else name
        sources.append(place if source.weight == 1 else f"{place}*{source.weight:g}")
    return ",".join(sources)


def read_prices(args: QuoteArguments, task: TaskFile) -> dict[str, Any]:
    """The offers of all clouds for all choices of GPUs (prices.py); none without --sky.

    Raises UserError if --sky has no SkyPilot.
    """
    if args.sky is None:
        return {"offers": [], "failed": {"any cloud": "--sky names no environment (make sky)"}}
    command = [args.sky, str(PRICES), "--clouds", *args.clouds, "--", *task.choices]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(result.stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise UserError(f"--sky {args.sky} cannot tell prices: {reason}") from error


if __name__ == "__main__":
    with one_line_errors():
        main(arguments, rest.tasks)
