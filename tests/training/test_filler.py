"""Each row once an epoch, when the rows do not divide by the ranks."""

from collections import Counter
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler

from finetune.training.filler import (
    FilledDataset,
    fill_batches,
    filler_of,
    num_real_tokens,
    uneven_rows,
)


def rows_of(num_rows: int) -> Dataset:
    rows = [{"input_ids": [n] * (20 + n), "labels": [n] * (20 + n)} for n in range(num_rows)]
    return Dataset.from_list(rows)


def loader(num_rows: int, *, batch_size: int, num_processes: int, rank: int) -> Any:
    """What accelerate makes of a DataLoader on one rank."""
    dataset = FilledDataset(rows_of(num_rows))
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(0))
    prepared = prepare_data_loader(
        DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=list),
        num_processes=num_processes,
        process_index=rank,
        use_seedable_sampler=True,
        put_on_device=False,
    )
    fill_batches(prepared)
    return prepared


@pytest.mark.parametrize("num_rows", [1, 3, 8, 13])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_each_row_is_seen_once_an_epoch(num_rows: int, batch_size: int, num_processes: int) -> None:
    for epoch in range(2):
        batches = []
        for rank in range(num_processes):
            shard = loader(num_rows, batch_size=batch_size, num_processes=num_processes, rank=rank)
            shard.set_epoch(epoch)
            batches.append(list(shard))
            assert len(shard) == len(batches[0]) == len(batches[rank])
        rows = [row for rank in batches for batch in rank for row in batch]
        real = [row["input_ids"][0] for row in rows if any(n != -100 for n in row["labels"])]
        assert Counter(real) == Counter(range(num_rows))


@pytest.mark.parametrize("num_rows", [1, 3, 8, 13, 24])
@pytest.mark.parametrize(
    ("num_processes", "drop_last"), [(1, False), (2, False), (5, False), (2, True)]
)
@pytest.mark.parametrize("is_filled", [True, False])
def test_the_summary_says_how_rows_count_that_do_not_divide_by_the_ranks(
    num_rows: int, num_processes: int, drop_last: bool, is_filled: bool
) -> None:
    """Compared with what accelerate and the fillers make of the rows."""
    seen: Counter[int] = Counter()
    num_fillers = 0
    for rank in range(num_processes):
        dataset = FilledDataset(rows_of(num_rows))
        prepared = prepare_data_loader(
            DataLoader(dataset, batch_size=3, collate_fn=list, drop_last=drop_last),
            num_processes=num_processes,
            process_index=rank,
            put_on_device=False,
        )
        if is_filled:
            fill_batches(prepared)
        rows = [row for batch in prepared for row in batch]
        real = [row for row in rows if any(n != -100 for n in row["labels"])]
        num_fillers += len(rows) - len(real)
        seen.update(row["input_ids"][0] for row in real)
    said = uneven_rows(
        num_rows,
        batch_size=3,
        num_processes=num_processes,
        drop_last=drop_last,
        is_filled=is_filled,
    )
    num_repeated = seen.total() - len(seen)
    if len(seen) < num_rows:
        assert said is not None and said.startswith(
            f"{num_rows - len(seen)} of {num_rows} rows are"
        )
    elif num_repeated:
        assert said is not None and said.startswith(
            f"{num_repeated} of {num_rows} rows count twice"
        )
    elif num_fillers:
        assert said is not None and f"all {num_rows} count once; {num_fillers} fillers" in said
    else:
        assert said is None


def test_a_loader_that_goes_on_in_mid_epoch_sees_the_rest() -> None:
    unbroken = list(loader(13, batch_size=2, num_processes=2, rank=1))
    resumed = skip_first_batches(loader(13, batch_size=2, num_processes=2, rank=1), 2)
    assert list(resumed) == unbroken[2:]


def test_a_filler_of_a_packed_row_is_one_short_conversation_outside_the_loss() -> None:
    row = {"input_ids": list(range(40)), "labels": list(range(40)), "seq_lengths": [25, 15]}
    filler = filler_of(row)
    assert filler == {
        "input_ids": list(range(16)),
        "labels": [-100] * 16,
        "seq_lengths": [16],
    }


def test_rates_count_neither_padding_nor_fillers() -> None:
    """Two conversations, of 5 and 3 tokens, and a filler of 4, padded and one after the other."""
    padded = {
        "attention_mask": torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 4 + [0]]),
        "labels": torch.tensor([[-100, 1, 1, 1, 1], [-100, -100, 1, -100, -100], [-100] * 5]),
    }
    assert num_real_tokens(padded) == 8
    flat = {
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]),
        "labels": torch.tensor([[-100, 1, 1, 1, 1, -100, -100, 1, *[-100] * 4]]),
    }
    assert num_real_tokens(flat) == 8
