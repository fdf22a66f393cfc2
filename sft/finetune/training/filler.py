"""Each row once an epoch, when the rows do not divide by the ranks.

accelerate (1.15.0, even_batches) fills the last batches with rows from the epoch's beginning, which
then count twice. Here the place is filled with a row that has no token in the loss: its rank takes
part in all collectives, its loss and its gradients are exactly zero.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import BatchSampler
from torch.utils.data import Dataset as TorchDataset

NUM_TOKENS = 16  # of a filler, at most: it costs next to nothing beside real rows


class FilledDataset(TorchDataset):
    """The rows of a dataset and, at the index after the last one, a filler."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows
        self.filler = filler_of(rows[0])

    def __len__(self) -> int:
        return len(self.rows)  # samplers draw from these, without the filler

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.filler if index == len(self.rows) else self.rows[index]


def filler_of(row: dict[str, Any]) -> dict[str, Any]:
    """The beginning of a row, without any token in the loss."""
    ids = row["input_ids"][:NUM_TOKENS]
    filler = {"input_ids": ids, "labels": [-100] * len(ids)}
    if "seq_lengths" in row:  # packed: the lengths of the row's conversations
        filler["seq_lengths"] = [len(ids)]
    return filler


class FilledBatches(BatchSampler):
    """The batches of a sampler, filled up to a multiple of num_processes batches of equal size."""

    def __init__(self, batches: BatchSampler, *, num_processes: int, filler: int) -> None:
        self.batches = batches
        self.sampler = batches.sampler  # accelerate tells it the epoch
        self.batch_size, self.drop_last = batches.batch_size, False
        self.num_processes, self.filler = num_processes, filler

    def __len__(self) -> int:
        return -(-len(self.batches) // self.num_processes) * self.num_processes

    def __iter__(self) -> Iterator[list[int]]:
        num_batches = 0
        for batch in self.batches:
            num_batches += 1
            yield batch + [self.filler] * (self.batch_size - len(batch))
        for _ in range(-num_batches % self.num_processes):
            yield [self.filler] * self.batch_size


def fill_batches(loader: Any) -> None:
    """Have the batches of a loader that accelerate has prepared filled up with fillers.

    loader: of a FilledDataset. On one rank, and with --dataloader_drop_last, nothing is filled up.
    """
    shard = loader.batch_sampler
    if isinstance(shard, BatchSamplerShard) and not shard.drop_last:
        shard.batch_sampler = FilledBatches(
            shard.batch_sampler,
            num_processes=shard.num_processes,
            filler=len(loader.dataset),
        )


def uneven_rows(
    num_rows: int, *, batch_size: int, num_processes: int, drop_last: bool, is_filled: bool
) -> str | None:
    """How the rows of an epoch count that do not fill a batch on every rank, or None if all do.

    batch_size: of one rank. is_filled: whether fillers are used; runs begun by versions without
    them go on as they began.
    """
    num_left = num_rows % (batch_size * num_processes)
    if num_left == 0 or (num_processes == 1 and not drop_last):
        return None
    num_missing = batch_size * num_processes - num_left
    if drop_last:
        return f"{num_left} of {num_rows} rows are left out of each epoch (--dataloader_drop_last)"
    if is_filled:
        return f"all {num_rows} count once; {num_missing} fillers outside the loss even the ranks"
    return f"{num_missing} of {num_rows} rows count twice, to even the ranks, as this run began"


def num_real_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """How many tokens of a batch are neither padding nor a filler's: a tensor of one number.

    A filler is what has no token in the loss: such conversations are left out of the data. In a
    batch without attention_mask, (1, T), conversations follow each other, and the position_ids
    begin again with each.
    """
    in_loss = batch["labels"] != -100
    if "attention_mask" in batch:
        return (batch["attention_mask"].bool() & in_loss.any(dim=1, keepdim=True)).sum()
    conversation = (batch["position_ids"] == 0).flatten().cumsum(dim=0)  # its number, from 1
    num_in_loss = torch.zeros_like(conversation).scatter_add_(
        0, (conversation - 1).clamp(min=0), in_loss.flatten().to(conversation.dtype)
    )
    return (num_in_loss[(conversation - 1).clamp(min=0)] > 0).sum()
