"""Conversations in, tokens with labels out; what is wrong with a dataset is said here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, DatasetDict, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase
from trl import ScriptArguments, SFTConfig
from trl.chat_template_utils import get_training_chat_template

from errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
EXAMPLE = (
    '{"messages": [{"role": "user", "content": "2+2?"}, '
    '{"role": "assistant", "thinking": "Easy.", "content": "4"}]}'
)


def load_datasets(
    script_args: ScriptArguments, training_args: SFTConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None]:
    """The split to train on and, where the flags ask for evaluation, the one to evaluate on."""
    splits = [script_args.dataset_train_split]
    if training_args.eval_strategy != "no":
        splits.append(script_args.dataset_test_split)
    train_dataset, *rest = [
        load_data(
            script_args.dataset_name,
            tokenizer,
            max_length=training_args.max_length,
            config=script_args.dataset_config,
            split=split,
        )
        for split in splits
    ]
    return train_dataset, rest[0] if rest else None


def load_data(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    config: str | None = None,
    split: str = "train",
) -> Dataset:
    """Read `source` and tokenise it once per node; the other processes read the cache.

    Returns a dataset with `input_ids` and `labels` (-100 = not in the loss), each at most
    max_length long. Raises UserError for whatever a user can mend.
    """
    if not PartialState().is_local_main_process:
        disable_progress_bars()
    with PartialState().local_main_process_first():
        conversations = load_conversations(source, config=config, split=split)
        return tokenize(conversations, tokenizer, max_length=max_length)


def load_conversations(source: str, *, config: str | None = None, split: str = "train") -> Dataset:
    """Rows with a `messages` column from a hub name, a .jsonl file or a folder of them."""
    path = Path(source)
    if path.suffix in (".jsonl", ".json") or path.exists():
        if split != "train":
            raise UserError(
                f"{source!r} is a local dataset and has no split {split!r} to evaluate on"
            )
        files = jsonl_files(path)
        if sum(check_jsonl(file) for file in files) == 0:
            raise UserError(f"dataset {source!r} is empty: it needs at least one conversation")
        dataset = read("json", data_files=[str(file) for file in files], split="train")
    else:
        dataset = read(source, name=config, split=split)
    if "messages" not in dataset.column_names:
        raise UserError(
            f"dataset {source!r} has the columns {', '.join(dataset.column_names)}: "
            f"it needs `messages`, like {EXAMPLE}"
        )
    return dataset


def read(path: str, **kwargs: Any) -> Dataset:
    """datasets.load_dataset, its many exceptions turned into one line."""
    try:
        dataset = load_dataset(path, **kwargs)
    except (OSError, ValueError, DatasetGenerationError) as error:
        reason = next((line for line in str(error.__cause__ or error).splitlines() if line), "")
        raise UserError(
            f"dataset {kwargs.get('data_files', path)!r} cannot be read (a hub name, a .jsonl file "
            f"or a folder of them; is the hub reachable?): {type(error).__name__}: {reason}"
        ) from error
    assert not isinstance(dataset, DatasetDict)
    return dataset


def jsonl_files(path: Path) -> list[Path]:
    """The .jsonl files at or below path. Raises UserError if there are none."""
    if not path.exists():
        raise UserError(
            f"dataset {str(path)!r} does not exist: set DATASET to a file, a folder or a hub name"
        )
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"folder {str(path)!r} holds no .jsonl file")
    return files


def check_jsonl(file: Path) -> int:
    """Count the conversations. Raises UserError at the first line that is none, with its number."""
    count = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            count += 1
            problem = find_problem(line)
            if problem is not None:
                raise UserError(f"{file}:{number}: {problem}; a line looks like {EXAMPLE}")
    return count


def find_problem(line: bytes) -> str | None:
    """What keeps this JSONL line from being a conversation, or None."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start})"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    if not isinstance(row, dict):
        return f"a {type(row).__name__}, not an object"
    if "messages" not in row:
        return f"no `messages` among the columns {', '.join(row) or '(none)'}"
    return next(message_problems(row["messages"]), None)


def message_problems(messages: Any) -> Iterator[str]:
    """What is wrong with one conversation's messages."""
    if not isinstance(messages, list) or not messages:
        yield "`messages` is not a list of messages"
        return
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            yield f"{where} is a {type(message).__name__}, not an object"
        elif message.get("role") not in ROLES:
            yield f"{where} has the role {message.get('role')!r}, not one of {', '.join(ROLES)}"
        elif not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            yield f"{where} has no text in `content`"
    if not any(isinstance(m, dict) and m.get("role") == "assistant" for m in messages):
        yield "no assistant message, so nothing to learn"


def tokenize(
    conversations: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Dataset:
    """Render with the model's chat template; only the assistant's tokens keep a label.

    Conversations longer than max_length are cut there; those left without a label are dropped. Both
    are counted in a printed line. Raises UserError if no label is left at all.
    """
    template = get_training_chat_template(tokenizer) or tokenizer.chat_template

    def render(row: dict[str, Any]) -> dict[str, Any]:
        tokens = tokenizer.apply_chat_template(
            row["messages"],
            tools=row.get("tools"),
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        ids, mask = tokens["input_ids"], tokens["assistant_masks"]
        labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
        return {
            "input_ids": ids[:max_length],
            "labels": labels[:max_length],
            "num_tokens": len(ids),
            "num_labels": sum(label != -100 for label in labels[:max_length]),
        }

    rendered = conversations.map(
        render, remove_columns=conversations.column_names, desc="Tokenizing"
    )
    lengths, num_labels = rendered["num_tokens"], rendered["num_labels"]
    num_cut = sum(length > max_length for length in lengths)
    num_dropped = sum(count == 0 for count in num_labels)
    if num_dropped == len(rendered):
        raise UserError(
            f"every label is masked: of {len(rendered)} conversations none reaches an "
            f"assistant token within max_length={max_length}: raise it"
        )
    PartialState().print(
        f"data: {len(rendered)} conversations, {sum(lengths):,} tokens, longest {max(lengths)}; "
        f"{num_cut} cut at max_length={max_length}, {num_dropped} dropped (no assistant token left)"
    )
    kept = rendered.filter(lambda count: count > 0, input_columns="num_labels", desc="Filtering")
    return kept.select_columns(["input_ids", "labels"])
