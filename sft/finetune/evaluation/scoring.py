"""Loss, perplexity and token accuracy of a model on conversations, overall and by channel."""

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from finetune.data.harmony_parser import ChannelReader
from finetune.summary import perplexity

OVERALL = "overall"
Row = dict[str, list[int]]


def score(
    model: PreTrainedModel, tokens: Dataset, reader: ChannelReader, *, max_length: int
) -> dict[str, dict[str, float]]:
    """By channel, and overall: tokens, loss (nats a token), perplexity, token_accuracy (0 to 1).

    model: with trl's fused LM head, which projects what is learnt, tile by tile. tokens: input_ids
    and labels; whole conversations are packed into rows of at most max_length tokens, or of one
    that is longer. Every token weighs the same.
    """
    sums: dict[str, torch.Tensor] = {}
    for rows in packed(tokens, max_length=max_length):
        batch, channels = collate(rows, reader)
        batch = {name: values.to(model.device) for name, values in batch.items()}
        with torch.no_grad():
            output = model(**batch, fused_lm_head=True)
        learnt = output.label_mask[0]
        measured = torch.stack([learnt.double(), -output.log_probs[0].double(), output.is_top1[0]])
        measured = measured[:, learnt].cpu()
        names = [channel for channel, used in zip(channels, learnt.tolist(), strict=True) if used]
        for name in set(names):
            of_channel = torch.tensor([other == name for other in names])
            total = measured[:, of_channel].sum(dim=1)
            sums[name] = sums[name] + total if name in sums else total
    overall = torch.stack(list(sums.values())).sum(dim=0)
    return {name: figures(total) for name, total in [(OVERALL, overall), *sorted(sums.items())]}


def packed(tokens: Dataset, *, max_length: int) -> Iterator[list[Row]]:
    rows: list[Row] = []
    for row in tokens:
        if rows and sum(len(other["input_ids"]) for other in (*rows, row)) > max_length:
            yield rows
            rows = []
        rows.append(row)
    yield rows


def collate(rows: list[Row], reader: ChannelReader) -> tuple[dict[str, torch.Tensor], list[str]]:
    """One row (1, T) of whole conversations, which position_ids keep apart, and the channel of each
    token but the first.
    """
    ids = [number for row in rows for number in row["input_ids"]]
    # Nothing comes before the first token of a conversation, least of all the one before it.
    labels = [number for row in rows for number in (-100, *row["labels"][1:])]
    positions = [number for row in rows for number in range(len(row["input_ids"]))]
    channels = [name for row in rows for name in reader.channels(row["input_ids"])]
    named = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.tensor([values]) for name, values in named.items()}, channels[1:]


def figures(sums: torch.Tensor) -> dict[str, float]:
    num_tokens, loss, num_right = sums.tolist()
    mean = loss / num_tokens
    return {
        "tokens": int(num_tokens),
        "loss": mean,
        "perplexity": perplexity(mean),
        "token_accuracy": num_right / num_tokens,
    }


def compare_scores(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each channel: tokens, and of every other figure [before, after]."""
    return {
        name: {"tokens": after[name]["tokens"]}
        | {key: [before[name][key], after[name][key]] for key in after[name] if key != "tokens"}
        for name in after
    }
