"""The conversations that an export is compared on."""

from dataclasses import replace
from pathlib import Path

from finetune.export.base import open_base
from finetune.export.samples import MAX_TOKENS, conversations_of_run
from finetune.export.source import find_run_weights


def test_they_are_the_first_of_the_runs_dataset(run_dir: Path) -> None:
    record = find_run_weights(run_dir).record
    rows, description = conversations_of_run(record, open_base(record), num_examples=2)
    assert len(rows) == 2 and description == "the first 2 conversations of the training data"
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"]) <= MAX_TOKENS
        assert any(label != -100 for label in row["labels"])


def test_held_out_conversations_are_preferred(run_dir: Path) -> None:
    record = find_run_weights(run_dir).record
    data = replace(record.data, test_split_size=0.5)
    record = replace(record, data=data, eval_strategy="steps")
    _, description = conversations_of_run(record, open_base(record), num_examples=2)
    assert description == "the first 2 conversations of the held-out data"


def test_a_built_in_one_stands_in_for_a_dataset_that_cannot_be_read(run_dir: Path) -> None:
    record = replace(find_run_weights(run_dir).record, dataset="/gone.jsonl")
    rows, description = conversations_of_run(record, open_base(record), num_examples=2)
    assert len(rows) == 1 and "built-in" in description
    assert len(rows[0]["input_ids"]) > 20
