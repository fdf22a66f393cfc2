"""What makes two launches the same run."""

from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets

from finetune.arguments import parse_args
from finetune.checkpoint.fingerprint import RunRecord, check_same_run, dataset_sha256, run_record
from finetune.errors import UserError
from helpers.launching import defaults

ROWS = [{"input_ids": list(range(n)), "labels": [-100] * n} for n in range(1, 40)]


def test_the_hash_is_of_the_tokens_however_they_lie() -> None:
    whole = Dataset.from_list(ROWS)
    parts = concatenate_datasets([Dataset.from_list(ROWS[:7]), Dataset.from_list(ROWS[7:])])
    assert dataset_sha256(parts) == dataset_sha256(whole)
    assert dataset_sha256(whole.select(range(38))) != dataset_sha256(whole)
    assert dataset_sha256(whole.select([1, 0, *range(2, 39)])) != dataset_sha256(whole)
    recut = [{"input_ids": [0, 0], "labels": [1, 1]}, {"input_ids": [0], "labels": [1]}]
    assert dataset_sha256(Dataset.from_list(recut)) != dataset_sha256(
        Dataset.from_list(recut[::-1])
    )


def test_a_change_is_named_with_both_ways_out(tiny_model: Path, tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)

    def of(*flags: str, num_processes: int = 2) -> RunRecord:
        config = parse_args([*defaults(tiny_model, tmp_path), *flags])
        return run_record(
            config, dataset, conversation_start_date="2026-01-02", num_processes=num_processes
        )

    saved = of()
    check_same_run("checkpoint-2", saved, of())
    check_same_run("checkpoint-2", saved, of("--gradient_accumulation_steps=2", num_processes=1))
    with pytest.raises(UserError) as refused:
        check_same_run("checkpoint-2", saved, of("--learning_rate=0.5", "--seed=7"))
    assert "learning_rate 0.01 -> 0.5; seed 42 -> 7" in str(refused.value)
    assert "RUN_NAME" in str(refused.value) and "--ignore_fingerprint true" in str(refused.value)
    with pytest.raises(UserError, match="train_on assistant -> everything"):
        check_same_run("checkpoint-2", saved, of("--train_on=everything"))
    with pytest.raises(UserError, match="global_batch_size 2 -> 4"):
        check_same_run("checkpoint-2", saved, of(num_processes=4))


def test_other_weights_are_another_model(tiny_model: Path, tmp_path: Path) -> None:
    from finetune.checkpoint.fingerprint import model_revision

    before = model_revision(str(tiny_model), revision="main")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_revision(str(copy), revision="main") == before
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert model_revision(str(copy), revision="main") != before
