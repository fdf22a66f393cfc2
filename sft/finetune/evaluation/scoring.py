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
    """By channel, and overall: tokens, loss (nats per token), perplexity, token_accuracy (0 to 1).

    Every token in the loss has the same weight. model: with TRL's fused LM head, which computes
    the logits of those tokens tile by tile. tokens: input_ids and labels. Complete conversations
    are packed into rows of at most max_length tokens; a longer one has a row of its own.
    """
    sums: dict[str, torch.Tensor] = {}
    for rows in packed(tokens, max_length=max_length):
        batch, channels = collate(rows, reader)
        batch = {name: values.to(model.device) for name, values in batch.items()}
        with torch.no_grad():
            output = model(**batch, fused_lm_head=True)
        in_loss = output.label_mask[0]
        # (3, T): what is summed up for each token is 1, its loss, and whether it was the likeliest.
        # In fp64, because a float32 sum over a million tokens loses digits.
        measured = torch.stack([in_loss.double(), -output.log_probs[0].double(), output.is_top1[0]])
        measured = measured[:, in_loss].cpu()
        names = [channel for channel, used in zip(channels, in_loss.tolist(), strict=True) if used]
        for name in set(names):
            of_channel = torch.tensor([other == name for other in names])
            total = measured[:, of_channel].sum(dim=1)
            sums[name] = sums[name] + total if name in sums else total
    overall = torch.stack(list(sums.values())).sum(dim=0)
    return {name: figures(total) for name, total in [(OVERALL, overall), *sorted(sums.items())]}


def packed(tokens: Dataset, *, max_length: int) -> Iterator[list[Row]]:
    """Conversations in their order, as many together as fit into max_length tokens."""
    rows: list[Row] = []
    for row in tokens:
        if rows and sum(len(other["input_ids"]) for other in (*rows, row)) > max_length:
            yield rows
            rows = []
        rows.append(row)
    yield rows


def collate(rows: list[Row], reader: ChannelReader) -> tuple[dict[str, torch.Tensor], list[str]]:
    """A batch of one row, (1, T), and the channel of each token but the first, all predicted ones.

    The position_ids start again with each conversation: that keeps them apart in attention.
    """
    ids = [number for row in rows for number in row["input_ids"]]
    # The first token of a conversation must not be predicted from the conversation before it.
    labels = [number for row in rows for number in (-100, *row["labels"][1:])]
    positions = [number for row in rows for number in range(len(row["input_ids"]))]
    channels = [name for row in rows for name in reader.channels(row["input_ids"])]
    named = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.tensor([values]) for name, values in named.items()}, channels[1:]


def figures(sums: torch.Tensor) -> dict[str, float]:
    """sums: (3,), of the tokens, their losses, and how many were the likeliest."""
    num_tokens, loss, num_right = sums.tolist()
    mean = loss / num_tokens
    return {
        "tokens": int(num_tokens),
        "loss": mean,
        "perplexity": perplexity(mean),
        "token_accuracy": num_right / num_tokens,
    }


def compare_scores(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each channel: tokens, and [before, after] of every other figure."""
    return {
        name: {"tokens": after[name]["tokens"]}
        | {key: [before[name][key], after[name][key]] for key in after[name] if key != "tokens"}
        for name in after
    }
