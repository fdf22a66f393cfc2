"""What a dataset becomes: conversations as the model sees them, the loss, packing and steps.

    python sft/preview.py --dataset FILE_OR_NAME --tokenizer NAME_OR_FOLDER [--json true]

Needs a tokenizer, no model and no GPU. `make preview DATASET=my.jsonl` calls it.
"""

from dataclasses import dataclass, field

from finetune.command_line import CommandLine
from finetune.data.options import DataArguments, check_data_arguments


@dataclass
class PreviewArguments:
    """What to show of which dataset."""

    dataset: str = field(metadata={"help": "As DATASET in a task file."})
    tokenizer: str = field(metadata={"help": "Name or folder of the model, or of its tokenizer."})
    num_examples: int = field(default=3, metadata={"help": "How many conversations to show."})
    task: str | None = field(
        default=None, metadata={"help": "The task file that will train on it: packing and steps."}
    )
    json: bool = field(
        default=False, metadata={"help": "Every example as a line of input_ids and labels."}
    )


def command_line() -> CommandLine:
    return CommandLine(PreviewArguments, DataArguments, description=__doc__)


if __name__ == "__main__":
    arguments = command_line().parse_args_into_dataclasses()  # before the imports, which take 8 s

import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from finetune.arguments import parse_args
from finetune.data.dataset import load_conversations, render_all
from finetune.errors import UserError, one_line_errors
from finetune.model.loading import load_tokenizer
from finetune.task_file import TaskFile

BAR = 40  # characters of the longest bar of the histogram


def main(args: PreviewArguments, data_args: DataArguments) -> None:
    check_data_arguments(data_args)
    if not data_args.conversation_start_date:
        data_args = replace(data_args, conversation_start_date=date.today().isoformat())
    with redirect_stdout(sys.stderr):
        rows = load_conversations(args.dataset)
        tokenizer = load_tokenizer(args.tokenizer)
        tokens = render_all(rows, tokenizer, data_args)
    if args.json:
        for row in tokens:
            print(json.dumps({name: row[name] for name in ("input_ids", "labels")}))
        return
    console = Console(highlight=False, soft_wrap=True)
    for number, row in enumerate(tokens.select(range(min(args.num_examples, len(tokens))))):
        show_example(console, number + 1, row, tokenizer)
    show_summary(console, rows, tokens, args.task)


def show_example(
    console: Console, number: int, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The text of one conversation, what is in the loss in green."""
    console.rule(f"{number}: {row['num_tokens']:,} tokens, {row['num_loss_tokens']:,} in the loss")
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for in_loss, run in groupby(pairs, key=lambda pair: pair[1] != -100):
        text = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        console.print(Text(text, style="bold green" if in_loss else "dim"), end="")
    console.print()


def show_summary(console: Console, rows: Dataset, tokens: Dataset, task: str | None) -> None:
    """Counts, a histogram of the lengths and, for a task, what its packing and batches make."""
    lengths = tokens.data["num_tokens"].to_numpy()
    learnt = tokens.data["num_loss_tokens"].to_numpy()
    table = Table(show_header=False)
    table.add_row("recognised as", ", ".join(rows.unique("shape")))
    table.add_row("conversations", f"{len(rows):,}")
    table.add_row("tokens", f"{lengths.sum():,}")
    table.add_row("in the loss", f"{learnt.sum() / lengths.sum():.1%}")
    for row in epoch(tokens, lengths, task) if task else ():
        table.add_row(*row)
    console.print(histogram(lengths), table)


def histogram(lengths: np.ndarray) -> Table:
    """How many conversations have a length up to each power of two."""
    edges = 2 ** np.arange(4, np.ceil(np.log2(max(lengths.max(), 32))) + 1).astype(int)
    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))
    table = Table("tokens, up to", "conversations", "", box=None)
    for edge, count in zip(edges, counts, strict=True):
        if count or edge >= lengths.min():
            table.add_row(f"{edge:,}", f"{count:,}", "█" * round(BAR * count / counts.max()))
    return table


def epoch(tokens: Dataset, lengths: np.ndarray, task: str) -> list[tuple[str, str]]:
    """What an epoch of the recipe comes to."""
    recipe = TaskFile.read(Path(task))
    config = parse_args([*recipe.flags, "--use_cpu=true"]).training
    max_length = config.max_length or int(lengths.max())
    sequences = (
        config.per_device_train_batch_size * config.gradient_accumulation_steps * recipe.num_gpus
    )
    fitting = tokens.select(np.flatnonzero(lengths <= max_length))
    if len(fitting) == 0:
        raise UserError(f"every conversation is longer than {task}'s --max_length {max_length}")
    packed = pack_dataset(fitting.select_columns(["input_ids", "labels"]), max_length, "bfd")
    num_tokens = int(lengths[lengths <= max_length].sum())
    return [
        (f"longer than --max_length {max_length:,}", f"{len(tokens) - len(fitting):,} left out"),
        ("packed sequences", f"{len(packed):,}, {num_tokens / len(packed) / max_length:.1%} full"),
        ("steps an epoch", f"{-(-len(packed) // sequences):,} of {sequences} sequences"),
        ("tokens an epoch", f"{num_tokens:,}"),
    ]


if __name__ == "__main__":
    with one_line_errors():
        main(*arguments)
