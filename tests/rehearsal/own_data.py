"""A rehearsal with a user's own data: as many steps as the recipe has, if they are few."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from datasets import Dataset

from finetune.arguments import parse_task
from finetune.data.dataset import load_conversations, tokenize
from finetune.model.loading import load_tokenizer
from finetune.task_file import TaskFile
from finetune.training.num_steps import num_training_steps, sequences_of

MAX_TEXTS = 20_000  # that the tiny tokenizer is trained on
# Large enough for conversations to be about as long as in gpt-oss's own 201,088 tokens.
VOCABULARY = 16_384
MAX_STEPS, MIN_STEPS = 12, 2  # one launch is killed after some steps, and another goes on


def load(task: TaskFile, dataset: str) -> Dataset:
    """The conversations of the user's data. Raises UserError for bad rows."""
    return load_conversations(dataset, skip_bad_rows=parse_task(task).data.skip_bad_rows)


def texts_of(rows: Dataset) -> list[str]:
    """Texts of the conversations, for a tokenizer to be trained on."""
    return list(islice(all_texts(rows), MAX_TEXTS))


def all_texts(rows: Dataset) -> Iterator[str]:
    for row in rows:
        conversation = json.loads(row["conversation"])
        yield conversation.get("text") or json.dumps(conversation["tools"], ensure_ascii=False)
        for message in conversation.get("messages", []):
            yield message["content"]
            yield message.get("thinking") or ""
            yield from (call["arguments"] for call in message.get("tool_calls") or [])


def recipe_steps(task: TaskFile, rows: Dataset, model: Path) -> int:
    """The optimizer steps that the recipe takes with this data. Its global batch is kept.

    Raises UserError if nothing is left to train on.
    """
    config = parse_task(task)
    data = config.data
    if not data.conversation_start_date:
        data = replace(data, conversation_start_date="2026-01-02")
    max_length = config.training.max_length
    kept = tokenize(rows, load_tokenizer(str(model)), data, max_length=max_length)
    sequences = sequences_of(kept, config.training)
    return num_training_steps(len(sequences), config.training, num_gpus=task.num_gpus)


def flags_for(steps: int, given: set[str]) -> dict[str, str]:
    """The flags that a rehearsal must set where the recipe takes so many steps."""
    wanted = min(max(steps, MIN_STEPS), MAX_STEPS)
    flags = {"use_cpu": "true"}
    if "per_device_train_batch_size" not in given:
        # The global batch stays. On a CPU attention takes memory with the rows' square.
        flags["per_device_train_batch_size"] = "1"
    if wanted != steps and "max_steps" not in given:
        flags["max_steps"] = str(wanted)
    if "save_steps" not in given:
        flags["save_steps"] = str(max(1, wanted // 3))
    return flags
