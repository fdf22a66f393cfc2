"""What a dataset becomes: conversations as the model sees them, what is learnt, what packing makes.

Called by `python sft/data.py`; needs a tokenizer, no model and no GPU.
"""

import json
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import date
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import HfArgumentParser, PreTrainedTokenizerBase
from trl import pack_dataset

from data import load_conversations, render_all
from errors import UserError, one_line_errors
from flags import DataArguments, check_data_flags
from model import load_tokenizer

BAR = 40  # characters of the longest bar of the histogram
FLAGS = ("max_length", "per_device_train_batch_size", "gradient_accumulation_steps")


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


def main() -> None:
    with one_line_errors():
        parser = HfArgumentParser((PreviewArguments, DataArguments))
        args, data_args = parser.parse_args_into_dataclasses()
        check_data_flags(data_args)
        data_args.conversation_start_date = (
            data_args.conversation_start_date or date.today().isoformat()
        )
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
    console.rule(f"{number}: {row['num_tokens']:,} tokens, {row['num_learnt']:,} in the loss")
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    for is_learnt, run in groupby(pairs, key=lambda pair: pair[1] != -100):
        text = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        console.print(Text(text, style="bold green" if is_learnt else "dim"), end="")
    console.print()


def show_summary(console: Console, rows: Dataset, tokens: Dataset, task: str | None) -> None:
    """Counts, a histogram of the lengths and, for a task, what its packing and batches make."""
    lengths = tokens.data["num_tokens"].to_numpy()
    learnt = tokens.data["num_learnt"].to_numpy()
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
    max_length, *factors = read_batch(task)
    sequences = prod(factors)
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


def read_batch(task: str) -> tuple[int, int, int, int]:
    """(max_length, per-device batch, accumulation steps, GPUs) of a task file. Raises UserError."""
    try:
        config = yaml.safe_load(Path(task).read_text())
        flags = [int(re.findall(rf"--{name} (\d+)", config["run"])[-1]) for name in FLAGS]
        num_gpus = int(config["resources"]["accelerators"].split(":")[1]) * config["num_nodes"]
    except (OSError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{task} is no task file like those of this repository: {error}") from error
    return flags[0], flags[1], flags[2], num_gpus
