"""Conversations in, tokens with labels out; `sft/preview.py` shows what comes of a dataset."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, Features, Value, concatenate_datasets, disable_progress_bars
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments, SFTConfig

from finetune.data.checks import EXAMPLE, Row
from finetune.data.conversations import SHAPES, BadRow, shape_of, to_conversation
from finetune.data.harmony import Encoder, document_pieces, to_messages, to_pieces
from finetune.data.options import DataArguments
from finetune.data.sources import (
    Source,
    find_files,
    is_file,
    parse_sources,
    read_file,
    read_hub,
    without_nulls,
)
from finetune.errors import UserError

MAX_PROBLEMS = 20


def load_datasets(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Dataset, Dataset | None]:
    """What to train on and, where the flags ask for evaluation, what to evaluate on.

    Each row has `input_ids` and `labels` (-100 = not in the loss). The node's first process reads
    and tokenises, the others read its cache. Raises UserError for whatever a user can mend.
    """
    if not PartialState().is_local_main_process:
        disable_progress_bars()
    with PartialState().local_main_process_first():
        rows, held_out = load_parts(
            script_args,
            eval_strategy=training_args.eval_strategy,
            test_split_size=data_args.test_split_size,
            seed=training_args.seed,
        )
        max_length = training_args.max_length
        tokens = [
            tokenize(part, tokenizer, data_args, max_length=max_length)
            for part in (rows, held_out)
            if part is not None
        ]
    return tokens[0], tokens[1] if held_out is not None else None


def load_parts(
    script_args: ScriptArguments, *, eval_strategy: str, test_split_size: float, seed: int
) -> tuple[Dataset, Dataset | None]:
    """The conversations to train on, and those held out: a share of them, or a split of its own."""
    name, config = script_args.dataset_name, script_args.dataset_config
    rows = load_conversations(name, config=config, split=script_args.dataset_train_split)
    if eval_strategy == "no":
        return rows, None
    if test_split_size:
        parts = rows.train_test_split(test_split_size, seed=seed)
        return parts["train"], parts["test"]
    return rows, load_conversations(name, config=config, split=script_args.dataset_test_split)


def load_conversations(text: str, *, config: str | None = None, split: str = "train") -> Dataset:
    """Every conversation of the sources in `text`, as JSON in the column `conversation`.

    Raises UserError, naming up to 20 bad rows by file and line.
    """
    sources = parse_sources(text)
    parts = [weighted(load_source(source, config, split), source.weight) for source in sources]
    return concatenate_datasets(parts)


def load_source(source: Source, config: str | None, split: str) -> Dataset:
    if is_file(source.name):
        if split != "train":
            raise UserError(
                f"{source.name!r} has no split {split!r} to evaluate on: hold a share of it out "
                "with --test_split_size 0.02"
            )
        kwargs: dict[str, Any] = {"name": source.name, "files": find_files(source.name)}
    else:
        kwargs = {"name": source.name, "hub": read_hub(source.name, config=config, split=split)}
    features = Features({"conversation": Value("large_string"), "shape": Value("string")})
    try:
        return Dataset.from_generator(conversations_of, gen_kwargs=kwargs, features=features)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = error.__cause__ or error
        raise UserError(
            f"dataset {source.name!r} cannot be read: {type(reason).__name__}: {reason}"
        ) from error


def weighted(dataset: Dataset, weight: float) -> Dataset:
    """Every row floor(weight) times, and a random share of them once more."""
    whole, share = int(weight), weight - int(weight)
    some = np.random.default_rng(0).permutation(len(dataset))[: round(share * len(dataset))]
    parts = [dataset] * whole + ([dataset.select(np.sort(some))] if len(some) else [])
    return concatenate_datasets(parts) if parts else dataset.select([])


def conversations_of(
    name: str, files: list[tuple[str, str]] | None = None, hub: Dataset | None = None
) -> Iterator[Row]:
    """Every row as the conversation it holds. Raises UserError with the rows that hold none."""
    problems: list[str] = []
    num_rows = num_problems = 0
    for where, row in rows_of(name, files, hub):
        num_rows += 1
        try:
            if isinstance(row, str):
                raise BadRow(row)
            yield {
                "conversation": json.dumps(to_conversation(row), ensure_ascii=False),
                "shape": shape_of(row),
            }
        except BadRow as error:
            num_problems += len(error.args)
            problems += [f"{where}: {problem}" for problem in error.args]
            del problems[MAX_PROBLEMS:]
    if num_rows == 0:
        raise UserError(f"dataset {name!r} is empty: it needs at least one conversation")
    if problems:
        more = num_problems - len(problems)
        raise UserError(
            "\n".join(
                [
                    f"dataset {name!r} has {num_problems} problem{'s'[: num_problems > 1]}:",
                    *problems,
                    *([f"and {more} more"] if more else []),
                    f"a row looks like {EXAMPLE}, or has the columns of {', '.join(SHAPES)}",
                ]
            )
        )


def rows_of(
    name: str, files: list[tuple[str, str]] | None, hub: Dataset | None
) -> Iterator[tuple[str, Row | str]]:
    """(file and line, row) of every row of a source, in order."""
    for url, _ in files or []:
        path = url.removeprefix("file://")
        for number, row in read_file(url):
            yield f"{path}:{number}", row
    if hub is not None:
        for number, row in enumerate(hub, start=1):
            yield f"{name}, row {number}", without_nulls(row)


def render(
    rows: dict[str, list[str]],
    *,
    encoder: Encoder,
    data_args: DataArguments,
    cut_at: int | None,
) -> dict[str, list[Any]]:
    """A batch of conversations as `input_ids` and `labels`, both cut; num_tokens: before that."""
    pieces = []
    for text in rows["conversation"]:
        conversation = json.loads(text)
        if "text" in conversation:
            pieces.append(document_pieces(conversation["text"]))
            continue
        messages = to_messages(
            conversation,
            date=data_args.conversation_start_date,
            reasoning_effort=data_args.reasoning_effort,
        )
        train_on, learn_no_thinking = data_args.train_on, data_args.learn_no_thinking
        pieces.append(to_pieces(messages, train_on, learn_no_thinking=learn_no_thinking))
    input_ids, labels = encoder.encode(pieces)
    labels = [row[:cut_at] for row in labels]
    return {
        "input_ids": [row[:cut_at] for row in input_ids],
        "labels": labels,
        "num_tokens": [len(row) for row in input_ids],
        "num_loss_tokens": [len(row) - row.count(-100) for row in labels],
    }


def render_all(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    *,
    cut_at: int | None = None,
) -> Dataset:
    """Every row, in order, with the columns of `render`."""
    return rows.map(
        render,
        batched=True,
        fn_kwargs={"encoder": Encoder(tokenizer), "data_args": data_args, "cut_at": cut_at},
        remove_columns=rows.column_names,
        desc="Tokenizing",
    )


def tokenize(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    *,
    max_length: int | None,
) -> Dataset:
    """The rows as `input_ids` and `labels`, without those that are longer than max_length tokens
    (with --truncate true: cut there) or have nothing to learn; what was left out is printed.

    Raises UserError if nothing is left.
    """
    tokens = render_all(
        rows, tokenizer, data_args, cut_at=max_length if data_args.truncate else None
    )
    lengths = tokens.data["num_tokens"].to_numpy()
    is_long = lengths > (max_length or np.inf)
    is_empty = tokens.data["num_loss_tokens"].to_numpy() == 0
    is_kept = ~is_empty if data_args.truncate else ~(is_empty | is_long)
    shapes = ", ".join(rows.unique("shape"))
    said = [
        f"data: {len(rows)} conversations ({shapes}), {lengths.sum():,} tokens, half of them up to "
        f"{int(np.median(lengths))} long, longest {lengths.max()}"
    ]
    if is_long.any():
        done = "cut" if data_args.truncate else "left out"
        said.append(f"{is_long.sum()} longer than max_length={max_length} {done}")
    if (is_empty & ~is_long).any():
        said.append(f"{(is_empty & ~is_long).sum()} without anything to learn left out")
    PartialState().print("; ".join(said))
    if not is_kept.any():
        raise UserError(
            f"nothing is left to train on: of {len(rows)} conversations {is_long.sum()} are longer "
            f"than max_length={max_length} (raise it, or cut them with --truncate true) and "
            f"{is_empty.sum()} have nothing to learn"
        )
    kept = tokens if is_kept.all() else tokens.select(np.flatnonzero(is_kept))
    return kept.select_columns(["input_ids", "labels"])


def mean_length(dataset: Dataset) -> float:
    """Tokens of a row, from Arrow's offsets: no list is made of any row."""
    batches = dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=1000)
    num_tokens = sum(pc.sum(pc.list_value_length(batch["input_ids"])).as_py() for batch in batches)
    return num_tokens / len(dataset)
