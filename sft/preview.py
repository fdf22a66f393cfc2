"""What a dataset becomes: conversations as the model sees them, the loss, packing and steps.

    python sft/preview.py --dataset FILE_OR_NAME --tokenizer NAME_OR_FOLDER [--task TASK.yaml]

Needs a tokenizer, but neither a model nor a GPU. `make preview DATASET=my.jsonl` calls it.
"""

from dataclasses import dataclass, field

from finetune.command_line import CommandLine
from finetune.data.options import DataArguments, check_data_arguments


@dataclass
class PreviewArguments:
    """Which dataset to show, and how."""

    dataset: str = field(
        metadata={"help": "The dataset, written like DATASET in a task file: a file or a hub name."}
    )
    tokenizer: str = field(
        metadata={"help": "The hub name or the folder of a model, or of its tokenizer alone."}
    )
    num_examples: int = field(default=3, metadata={"help": "How many conversations to show."})
    task: str | None = field(
        default=None,
        metadata={
            "help": "The task file that will train on the dataset. Its flags apply to the preview, "
            "and the summary then tells the packing and the steps of an epoch."
        },
    )
    svg: str | None = field(
        default=None, metadata={"help": "Also save the conversations shown as this SVG file."}
    )
    json: bool = field(
        default=False,
        metadata={
            "help": "Print input_ids and labels of every conversation as a line of JSON, and "
            "nothing else."
        },
    )


def command_line() -> CommandLine:
    return CommandLine(PreviewArguments, DataArguments, description=__doc__)


if __name__ == "__main__":
    arguments = command_line().parse_args_into_dataclasses()  # before the imports, which take 8 s

import json
import math
import sys
from contextlib import redirect_stdout
from dataclasses import fields, replace
from datetime import date
from io import StringIO
from itertools import groupby
from pathlib import Path

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from finetune.arguments import Config, parse_task
from finetune.data.dataset import (
    count_notes,
    count_tokens,
    extra_tokens,
    load_conversations,
    render_all,
    tokenize,
)
from finetune.data.sources import parse_sources
from finetune.data.verdict import count_turns, learnt_in_words, left_out_in_words, what_looks_wrong
from finetune.errors import UserError, one_line_errors
from finetune.model.loading import load_tokenizer
from finetune.summary import printable
from finetune.task_file import TaskFile
from finetune.training.num_steps import (
    few_steps,
    num_training_steps,
    sequences_of,
    sequences_per_step,
)

BAR_COLUMNS = 40  # the longest bar of the histogram
SVG_COLUMNS = 100


def main(args: PreviewArguments, data_args: DataArguments) -> None:
    check_data_arguments(data_args)
    task = TaskFile.read(Path(args.task)) if args.task else None
    config = task_config(task, data_args) if task else None
    data_args = config.data if config else data_args
    if not data_args.conversation_start_date:
        data_args = replace(data_args, conversation_start_date=date.today().isoformat())
    with redirect_stdout(sys.stderr):  # so that --json prints JSON alone
        skipped: list[str] = []
        rows = load_conversations(
            args.dataset, skip_bad_rows=data_args.skip_bad_rows, skipped=skipped
        )
        tokenizer = load_tokenizer(args.tokenizer)
        tokens = render_all(rows, tokenizer, data_args)
    is_first = tokens.data["sample"].to_numpy() == 1
    shown = tokens.select(np.flatnonzero(is_first.cumsum() <= args.num_examples))
    if args.svg:
        save_svg(Path(args.svg), shown, tokenizer)
    if args.json:
        print_json(tokens)
        return
    console = Console(highlight=False, soft_wrap=True)
    show_conversations(console, shown, tokenizer)
    console.print(histogram(tokens.data["num_tokens"].to_numpy()))
    summary = dataset_summary(rows, tokens)
    max_length, few = None, None
    if task and config:
        max_length = config.training.max_length
        with redirect_stdout(sys.stderr):
            kept = tokenize(rows, tokenizer, data_args, max_length=max_length)
        num_left_out = len(tokens) - len(kept)
        unit = "samples" if len(tokens) > len(rows) else "conversations"
        num_sequences, of_epoch = epoch_summary(
            kept, config.training, task.num_gpus, num_left_out=num_left_out, unit=unit
        )
        summary += of_epoch
        few = few_steps(num_training_steps(num_sequences, config.training, num_gpus=task.num_gpus))
    table = Table(show_header=False)
    for name, value in summary:
        table.add_row(name, Text(value))
    console.print(table)
    show_verdict(
        console,
        args.dataset,
        rows,
        tokens,
        data_args,
        skipped=skipped,
        max_length=max_length,
        few=few,
    )


def task_config(task: TaskFile, data_args: DataArguments) -> Config:
    """The flags of a task file. The data flags given to the preview itself take precedence."""
    given = [
        f"--{flag.name}={getattr(data_args, flag.name)}"
        for flag in fields(data_args)
        if getattr(data_args, flag.name) != flag.default
    ]
    return parse_task(task, *given)


def print_json(tokens: Dataset) -> None:
    for row in tokens:
        print(json.dumps({name: row[name] for name in ("input_ids", "labels")}))


def show_conversations(
    console: Console, tokens: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The text of each conversation: green where it is in the loss, dim where it is not."""
    number = 0
    for row in tokens:
        number += row["sample"] == 1
        counts = f"{row['num_tokens']:,} tokens, {row['num_loss_tokens']:,} in the loss"
        part = f", sample {row['sample']} of {row['num_samples']}"
        console.rule(f"{number}{part if row['num_samples'] > 1 else ''}: {counts}")
        text = Text()
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        for in_loss, group in groupby(pairs, key=lambda pair: pair[1] != -100):
            ids = [token for token, _ in group]
            style = "bold green" if in_loss else "dim"
            text.append(printable(tokenizer.decode(ids, skip_special_tokens=False)), style)
        console.print(text)


def save_svg(path: Path, tokens: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save the conversations as a picture. Raises UserError if the file cannot be written."""
    console = Console(record=True, width=SVG_COLUMNS, file=StringIO(), highlight=False)
    show_conversations(console, tokens, tokenizer)
    try:
        console.save_svg(str(path), title="preview.py: green is in the loss")
    except OSError as error:
        raise UserError(f"--svg {path} cannot be written: {error.strerror}") from error


def histogram(lengths: np.ndarray) -> Table:
    """How many conversations have a length up to each power of two, from 16 on."""
    edges = 2 ** np.arange(4, np.ceil(np.log2(max(lengths.max(), 32))) + 1).astype(int)
    counts = np.bincount(np.searchsorted(edges, lengths), minlength=len(edges))
    table = Table("tokens, up to", "conversations", "", box=None)
    for edge, count in zip(edges, counts, strict=True):
        if count or edge >= lengths.min():
            bar = "█" * round(BAR_COLUMNS * count / counts.max())
            table.add_row(f"{edge:,}", f"{count:,}", bar)
    return table


def dataset_summary(rows: Dataset, tokens: Dataset) -> list[tuple[str, str]]:
    """(name, value) of what the whole dataset comes to."""
    num_tokens = tokens.data["num_tokens"].to_numpy().sum()
    num_loss_tokens = tokens.data["num_loss_tokens"].to_numpy().sum()
    samples = []
    if len(tokens) > len(rows):
        samples = [("samples", f"{len(tokens):,}, {extra_tokens(tokens):,} tokens more")]
    return [
        ("recognised as", ", ".join(rows.unique("shape"))),
        ("conversations", f"{len(rows):,}"),
        *samples,
        ("tokens", f"{num_tokens:,}"),
        ("in the loss", f"{num_loss_tokens / num_tokens:.1%}"),
        *((note, f"{count:,} rows") for note, count in count_notes(rows).items()),
    ]


def show_verdict(
    console: Console,
    dataset: str,
    rows: Dataset,
    tokens: Dataset,
    data_args: DataArguments,
    *,
    skipped: list[str],
    max_length: int | None,
    few: str | None,
) -> None:
    """What is learnt, what is left out, and what looks wrong.

    skipped: the bad rows that load_conversations left out. few: the warning of few steps.
    """
    counts = count_turns(rows)
    is_repeated = any(source.weight > 1 for source in parse_sources(dataset))
    wrong = what_looks_wrong(
        rows, tokens, counts, max_length=max_length, is_repeated_on_purpose=is_repeated
    )
    if few:
        wrong.append(f"{few[0].upper()}{few[1:]}.")
    console.rule("verdict")
    sentences = learnt_in_words(tokens, counts, data_args)
    sentences += [f"Left out: {printable(line)}" for line in skipped]
    sentences += left_out_in_words(tokens, max_length=max_length, is_cut=data_args.truncate)
    for sentence in sentences:
        console.print(sentence, markup=False)
    console.print("Looks wrong:" if wrong else "Nothing looks wrong.")
    for sentence in wrong:
        console.print(f"  - {printable(sentence)}", markup=False)


def epoch_summary(
    kept: Dataset, training_args: SFTConfig, num_gpus: int, *, num_left_out: int, unit: str
) -> tuple[int, list[tuple[str, str]]]:
    """The sequences of an epoch of the task, and (name, value) of what it comes to.

    kept: what it trains on. unit: what its rows are called.
    """
    max_length = training_args.max_length
    num_tokens = count_tokens(kept)
    limit = f"{max_length:,}" if max_length else "none"
    summary = [(f"left out (--max_length {limit})", f"{num_left_out:,} {unit}")]
    sequences = sequences_of(kept, training_args)
    if training_args.packing and max_length:
        fill = num_tokens / len(sequences) / max_length
        summary.append(("packed sequences", f"{len(sequences):,}, {fill:.1%} full"))
    batch = sequences_per_step(training_args, num_gpus=num_gpus)
    summary += [
        ("steps an epoch", f"{math.ceil(len(sequences) / batch):,} of {batch} sequences"),
        ("tokens an epoch", f"{num_tokens:,}"),
    ]
    return len(sequences), summary


if __name__ == "__main__":
    with one_line_errors():
        main(*arguments)
