"""The optimizer steps of a run, and the warning where they are few."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig

from finetune.training.num_steps import few_steps, few_steps_of, num_training_steps


def args_of(folder: Path, **flags: Any) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, per_device_train_batch_size=1, **flags
    )


def test_steps_are_those_of_the_epochs_unless_max_steps_says_otherwise(tmp_path: Path) -> None:
    args = args_of(tmp_path, gradient_accumulation_steps=2, num_train_epochs=3)
    assert num_training_steps(17, args, num_gpus=4) == 9  # 3 steps an epoch
    assert num_training_steps(17, args_of(tmp_path, max_steps=50), num_gpus=4) == 50


def test_fewer_than_20_steps_are_warned_about() -> None:
    assert few_steps(20) is None
    assert "only 19 optimizer steps" in str(few_steps(19))


@pytest.mark.parametrize(("num_rows", "warned"), [(40, True), (400, False)])
def test_packed_rows_are_counted_as_packed(num_rows: int, warned: bool, tmp_path: Path) -> None:
    """Rows of 60 tokens fit 2 into 128: 40 rows are 20 sequences and 10 steps, 400 are 100."""
    ids = [list(range(60))] * num_rows
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    args = args_of(tmp_path, packing=True, max_length=128, num_train_epochs=1)
    warning = few_steps_of(rows, args, num_gpus=2)
    assert (warning is not None) == warned
    if warning:
        assert "only 10 optimizer steps" in warning
