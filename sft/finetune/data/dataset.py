"""From --dataset_name to tokens with labels. `sft/preview.py` shows the result for a dataset."""

import json
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, Features, List, Value, concatenate_datasets, disable_progress_bars
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments, SFTConfig

from finetune.credentials import without_secrets
from finetune.data.checks import EXAMPLE, Row
from finetune.data.conversations import SHAPES, BadRow, read_row, shape_of
from finetune.data.files import DataFile, find_files
from finetune.data.formats import read_file
from finetune.data.harmony import (
    CHANNEL,
    Encoder,
    Piece,
    all_messages,
    document_pieces,
    drop_past_analysis,
    to_pieces,
)
from finetune.data.options import DataArguments, EarlierDataArguments
from finetune.data.sources import Source, is_file, parse_sources, read_hub, rows_of_hub
from finetune.data.turn_samples import Sample, split_samples
from finetune.errors import UserError

MAX_PROBLEMS = 20  # how many problems of a dataset an error lists


def load_datasets(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those to evaluate on (None without --eval_strategy).

    Each row has `input_ids` and `labels` (-100 = not in the loss). The node's first process reads
    and tokenises; the others then read its cache. Raises UserError for whatever a user can fix.
    """
    if not PartialState().is_local_main_process:
        disable_progress_bars()
    with PartialState().local_main_process_first():
        train, held_out = load_splits(
            script_args,
            eval_strategy=training_args.eval_strategy,
            test_split_size=data_args.test_split_size,
            skip_bad_rows=data_args.skip_bad_rows,
            seed=training_args.seed,
        )
        max_length = training_args.max_length
        train_tokens = tokenize(train, tokenizer, data_args, max_length=max_length)
        if held_out is None:
            return train_tokens, None
        return train_tokens, tokenize(held_out, tokenizer, data_args, max_length=max_length)


def load_splits(
    script_args: ScriptArguments,
    *,
    eval_strategy: str,
    test_split_size: float,
    seed: int,
    skip_bad_rows: bool = False,
) -> tuple[Dataset, Dataset | None]:
    """The conversations to train on, and those held out (None if eval_strategy is "no").

    Held out are a random share of the conversations, or else the dataset's own test split. The
    same arguments give the same split, so that evaluate.py finds what a run has not seen.
    """
    name, config = script_args.dataset_name, script_args.dataset_config
    rows = load_conversations(
        name, config=config, split=script_args.dataset_train_split, skip_bad_rows=skip_bad_rows
    )
    if eval_strategy == "no":
        return rows, None
    if test_split_size:
        parts = rows.train_test_split(test_split_size, seed=seed)
        return parts["train"], parts["test"]
    return rows, load_conversations(
        name, config=config, split=script_args.dataset_test_split, skip_bad_rows=skip_bad_rows
    )


def load_conversations(
    text: str,
    *,
    config: str | None = None,
    split: str = "train",
    skip_bad_rows: bool = False,
    skipped: list[str] | None = None,
) -> Dataset:
    """All conversations of the sources in `text`, as JSON in the column `conversation`.

    The column `shape` has the name of the shape that the row was in. Raises UserError with the
    file, the line and the problem of up to MAX_PROBLEMS bad rows; with skip_bad_rows these are
    left out and printed instead, and their number is put into `skipped`, a line for each source.
    """
    sources = parse_sources(text)
    if not sources:
        raise UserError("the dataset is empty: set DATASET to a file, a folder or a hub name")
    return concatenate_datasets(
        [
            repeat(load_source(source, config, split, skip_bad_rows, skipped), source.weight)
            for source in sources
        ]
    )


def load_source(
    source: Source,
    config: str | None,
    split: str,
    skip_bad_rows: bool,
    skipped: list[str] | None = None,
) -> Dataset:
    """The conversations of one source, from the cache if it has not changed.

    See load_conversations for `skipped`.
    """
    # These arguments are the key of the cache, so a changed file is read again.
    kwargs: dict[str, Any]
    if is_file(source.name):
        found = find_files(source.name, split=split)
        for note in found.notes:
            PartialState().print(without_secrets(f"data: {source.name}: {note}"))
        kwargs = {"name": source.name, "files": found.files}
    else:
        kwargs = {"name": source.name, "hub": read_hub(source.name, config=config, split=split)}
    kwargs |= {"code": hash_of_code(), "skip_bad_rows": skip_bad_rows}
    features = Features(
        {
            "conversation": Value("large_string"),
            "shape": Value("string"),
            "notes": List(Value("string")),
            "warnings": List(Value("string")),
        }
    )
    try:
        rows = Dataset.from_generator(conversations_of, gen_kwargs=kwargs, features=features)
        return without_bad_rows(rows, source.name, skipped) if skip_bad_rows else rows
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        reason = error.__cause__ or error
        raise UserError(
            f"dataset {source.name!r} cannot be read: {type(reason).__name__}: {reason}"
        ) from error


def hash_of_code() -> str:
    """Of what reads and converts rows, so that a new version of it is not served an old cache."""
    code = sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    return code.hexdigest()


def without_bad_rows(rows: Dataset, name: str, skipped: list[str] | None = None) -> Dataset:
    """The rows that could be read; prints the others' number and names the first of them.

    Raises UserError if there are none.
    """
    is_bad = pc.is_null(rows.data["conversation"]).to_numpy()
    if not is_bad.any():
        return rows
    bad = rows.select(np.flatnonzero(is_bad))
    name = without_secrets(name)
    PartialState().print(f"data: {name}: {len(bad)} bad rows left out (--skip_bad_rows)")
    lines = [without_secrets(line) for line in first_warnings(bad)]  # each names its file
    for line in lines:
        PartialState().print(f"  {line}")
    if skipped is not None:
        skipped.append(f"{len(bad):,} of {len(rows):,} rows of {name} are bad, such as {lines[0]}.")
    if is_bad.all():
        raise UserError(f"dataset {name!r}: no row is left; the first: {lines[0]}")
    return rows.select(np.flatnonzero(~is_bad))


def repeat(dataset: Dataset, weight: float) -> Dataset:
    """Every row floor(weight) times, and a random share of the rows once more."""
    times, share = int(weight), weight - int(weight)
    # The seed is fixed: every launch of a run must train on the same rows.
    chosen = np.random.default_rng(0).permutation(len(dataset))[: round(share * len(dataset))]
    parts = [dataset] * times
    if len(chosen):
        parts.append(dataset.select(np.sort(chosen)))
    return concatenate_datasets(parts) if parts else dataset.select([])


def conversations_of(
    name: str,
    files: list[DataFile] | None = None,
    hub: Dataset | None = None,
    code: str = "",
    skip_bad_rows: bool = False,
) -> Iterator[Row]:
    """Yield the conversation of every row. Raises UserError at the end if there were bad rows.

    With skip_bad_rows a bad row is a null with its problems under `warnings`.
    """
    problems: list[str] = []
    num_rows = num_problems = 0
    for where, row in rows_of(name, files, hub):
        num_rows += 1
        try:
            if isinstance(row, str):
                raise BadRow(row)
            conversation, findings = read_row(row)
            unread = [f"key `{key}` not read" for key in sorted(findings.unread)]
            yield {
                "conversation": json.dumps(conversation, ensure_ascii=False),
                "shape": shape_of(row),
                "notes": [*map(encodable, sorted(set(findings.notes)) + unread)],
                "warnings": [encodable(f"{where}: {warning}") for warning in findings.warnings],
            }
        except BadRow as error:
            if skip_bad_rows:
                yield {
                    "conversation": None,
                    "shape": None,
                    "notes": [],
                    "warnings": [encodable(f"{where}: {problem}") for problem in error.args],
                }
                continue
            num_problems += len(error.args)
            problems += [encodable(f"{where}: {problem}") for problem in error.args]
            del problems[MAX_PROBLEMS:]
    if num_rows == 0:
        raise UserError(f"dataset {name!r} is empty: it needs at least one conversation")
    if problems:
        raise bad_rows_error(name, problems, num_problems)


def encodable(text: str) -> str:
    """The text, with half a surrogate pair spelt out as in JSON: names of keys may hold one."""
    return text.encode(errors="backslashreplace").decode()


def bad_rows_error(name: str, problems: list[str], num_problems: int) -> UserError:
    """The error for a dataset with bad rows. problems: those to list, of num_problems in all."""
    count = "1 problem" if num_problems == 1 else f"{num_problems} problems"
    lines = [f"dataset {name!r} has {count}:", *problems]
    if num_problems > len(problems):
        lines.append(f"and {num_problems - len(problems)} more")
    lines.append(f"a row looks like {EXAMPLE}, or has the columns of {', '.join(SHAPES)}")
    return UserError("\n".join(lines))


def rows_of(
    name: str, files: list[DataFile] | None, hub: Dataset | None
) -> Iterator[tuple[str, Row | str]]:
    """Yield (file and line, row) for every row of a source; see read_file for what a row can be."""
    for file in files or []:
        for number, row in read_file(file):
            yield f"{file.place}:{number}", row
    if hub is not None:
        for number, row in enumerate(rows_of_hub(hub), start=1):
            yield f"{name}, row {number}", row


def samples_of(text: str, data_args: DataArguments) -> list[list[Piece]]:
    """The pieces of each sample of a conversation that load_conversations has written as JSON."""
    conversation = json.loads(text)
    if "text" in conversation:
        return [document_pieces(conversation["text"])]
    messages = all_messages(
        conversation,
        date=data_args.conversation_start_date,
        reasoning_effort=data_args.reasoning_effort,
    )
    if data_args.learn_past_thinking:
        samples = split_samples(messages, data_args.train_on)
    else:
        samples = [Sample(drop_past_analysis(messages))]
    return [
        to_pieces(
            sample.messages,
            data_args.train_on,
            learn_no_thinking=data_args.learn_no_thinking,
            first_learnt=sample.first_learnt,
            as_earlier=isinstance(data_args, EarlierDataArguments),
        )
        for sample in samples
    ]


def render_batch(
    rows: dict[str, list[str]],
    *,
    encoder: Encoder,
    data_args: DataArguments,
    cut_at: int | None,
) -> dict[str, list[Any]]:
    """A batch of conversations as `input_ids` and `labels`, cut at `cut_at` tokens if it is set.

    There is a row for each sample; `sample` numbers those of a conversation from 1 to
    `num_samples`. `num_tokens` is the length before the cut, `num_loss_tokens` counts after it.
    `num_choices_left_out` counts the messages of which the choice to think is not in the loss.
    """
    of_rows = [samples_of(text, data_args) for text in rows["conversation"]]
    samples = [pieces for of_row in of_rows for pieces in of_row]
    input_ids, labels = encoder.encode(samples)
    labels = [row[:cut_at] for row in labels]
    # As arrays: `datasets` looks at each number of a list, which took a tenth of the time.
    return {
        "input_ids": [np.array(row[:cut_at], np.int64) for row in input_ids],
        "labels": [np.array(row, np.int64) for row in labels],
        "num_tokens": [len(row) for row in input_ids],
        "num_loss_tokens": [len(row) - row.count(-100) for row in labels],
        "num_choices_left_out": [choices_left_out(pieces) for pieces in samples],
        "sample": [number + 1 for of_row in of_rows for number in range(len(of_row))],
        "num_samples": [len(of_row) for of_row in of_rows for _ in of_row],
    }


def choices_left_out(pieces: list[Piece]) -> int:
    """How many channels' names are not in the loss although the model writes them."""
    return sum(
        before.text == CHANNEL and before.is_control and before.in_loss and not name.in_loss
        for before, name in pairwise(pieces)
    )


def render_all(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    *,
    cut_at: int | None = None,
) -> Dataset:
    """The samples of all conversations, in order, with the columns of render_batch."""
    return rows.map(
        render_batch,
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
    """The conversations as `input_ids` and `labels`, without what cannot be trained on.

    Left out are samples longer than max_length tokens (cut there with --truncate true) and those
    with no token in the loss. Prints how many. Raises UserError if nothing is left.
    """
    tokens = render_all(
        rows, tokenizer, data_args, cut_at=max_length if data_args.truncate else None
    )
    lengths = tokens.data["num_tokens"].to_numpy()
    is_long = lengths > (max_length or np.inf)
    is_empty = tokens.data["num_loss_tokens"].to_numpy() == 0
    is_kept = ~is_empty if data_args.truncate else ~(is_empty | is_long)
    shapes = ", ".join(rows.unique("shape"))
    parts = [
        f"data: {len(rows)} conversations ({shapes}), {lengths.sum():,} tokens, "
        f"median length {int(np.median(lengths))}, longest {lengths.max()}"
    ]
    if len(tokens) > len(rows):
        parts.append(
            f"{len(tokens)} samples, so that the thinking of every turn is learnt: "
            f"{extra_tokens(tokens):,} tokens more"
        )
    if is_long.any():
        action = "cut" if data_args.truncate else "left out"
        parts.append(f"{is_long.sum()} longer than max_length={max_length} {action}")
    if (is_empty & ~is_long).any():
        parts.append(f"{(is_empty & ~is_long).sum()} with no token in the loss left out")
    parts += [f"{note}: {count} rows" for note, count in count_notes(rows).items()]
    PartialState().print("; ".join(parts))
    for line in first_warnings(rows):
        PartialState().print(f"warning: {without_secrets(line)}")
    if not is_kept.any():
        raise UserError(
            f"nothing is left to train on: of {len(tokens)} "
            f"{'samples' if len(tokens) > len(rows) else 'conversations'}, {is_long.sum()} are "
            f"longer than max_length={max_length} (raise it, or cut them with --truncate true) "
            f"and {is_empty.sum()} have no token in the loss"
        )
    kept = tokens if is_kept.all() else tokens.select(np.flatnonzero(is_kept))
    return kept.select_columns(["input_ids", "labels"])


def count_notes(rows: Dataset) -> dict[str, int]:
    """What was read otherwise than it stands, and the keys that were not: the rows of each."""
    counts: Counter[str] = Counter()
    for batch in rows.select_columns("notes").with_format("arrow").iter(batch_size=1000):
        values = pc.value_counts(pc.list_flatten(batch["notes"]))
        counts.update({item["values"].as_py(): item["counts"].as_py() for item in values})
    return dict(counts.most_common())


def first_warnings(rows: Dataset) -> list[str]:
    """Up to MAX_PROBLEMS texts that look like another format's markup, by file and line."""
    lines: dict[str, None] = {}  # a repeated row is named once
    for batch in rows.select_columns("warnings").with_format("arrow").iter(batch_size=1000):
        lines |= dict.fromkeys(pc.list_flatten(batch["warnings"]).to_pylist())
        if len(lines) >= MAX_PROBLEMS:
            break
    return list(lines)[:MAX_PROBLEMS]


def extra_tokens(tokens: Dataset) -> int:
    """The tokens of all samples but the last of each conversation. tokens: what render_all made."""
    lengths, sample, last = (
        tokens.data[name].to_numpy() for name in ("num_tokens", "sample", "num_samples")
    )
    return int(lengths[sample < last].sum())


def count_tokens(dataset: Dataset) -> int:
    """The tokens of all rows, from the offsets that Arrow keeps: no row becomes a Python list."""
    batches = dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=1000)
    return sum(pc.sum(pc.list_value_length(batch["input_ids"])).as_py() for batch in batches)


def mean_length(dataset: Dataset) -> float:
    """Tokens per row."""
    return count_tokens(dataset) / len(dataset)
