"""What a person should know of a dataset before paying for a GPU: what is learnt, what looks wrong.

Each sentence names what was found, and what to do about it. Nothing here refuses a dataset.
"""

import json
from collections.abc import Iterator
from hashlib import blake2b
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from finetune.data.dataset import first_warnings
from finetune.data.options import DataArguments

# Shares from which on something looks wrong. They are rules of thumb.
FEW_IN_LOSS = 0.02  # of the tokens: a step then costs fifty times what it teaches
MANY_LEFT_OUT = 0.1  # of the samples: what is left is another dataset than the one given
FEW_THINKING = 0.05  # of the turns
MANY_REPEATED = 0.01  # of the conversations: a random share held out then holds some of them too
MAX_WARNINGS = 3


class Counts(NamedTuple):
    """Of all conversations. A turn is what the assistant writes until the user speaks again."""

    num_turns: int
    num_with_thinking: int
    num_calls: int
    num_repeated: int  # conversations that are equal to an earlier one


def count_turns(rows: Dataset) -> Counts:
    """rows: what load_conversations made."""
    num_turns = num_with_thinking = num_calls = 0
    digests = np.empty(len(rows), np.int64)
    for number, text in enumerate(texts_of(rows)):
        digests[number] = np.frombuffer(blake2b(text.encode(), digest_size=8).digest(), np.int64)[0]
        messages = json.loads(text).get("messages", [])
        for is_user, turn in groupby(messages, key=lambda message: message["role"] == "user"):
            answers = [] if is_user else [m for m in turn if m["role"] == "assistant"]
            num_turns += bool(answers)
            num_with_thinking += any(m.get("thinking") for m in answers)
            num_calls += sum(len(m.get("tool_calls") or []) for m in answers)
    num_repeated = len(rows) - len(np.unique(digests))
    return Counts(num_turns, num_with_thinking, num_calls, num_repeated)


def texts_of(rows: Dataset) -> Iterator[str]:
    for batch in rows.select_columns("conversation").with_format("arrow").iter(batch_size=1000):
        yield from batch["conversation"].to_pylist()


def learnt_in_words(tokens: Dataset, counts: Counts, data_args: DataArguments) -> list[str]:
    """What is in the loss and what is not, and why. tokens: what render_all made."""
    if data_args.train_on == "everything":
        return ["Learnt: every token, the user's and the system's too (--train_on everything)."]
    of = "the last turn" if data_args.train_on == "last_turn" else "every turn"
    sentences = [f"Learnt: the thinking, the calls and the answer of {of}, where they are there."]
    if counts.num_calls:
        sentences.append(
            f"Learnt: which tool is called, and with what: there are {counts.num_calls:,} calls."
        )
    sentences.append("Not learnt: what the server writes, such as prompts and results of tools.")
    num_messages = tokens.data["num_choices_left_out"].to_numpy().sum()
    if num_messages:
        sentences.append(
            f"Not learnt: whether to think, in {num_messages:,} messages of turns that show no "
            "thinking. Their channel's name is not in the loss, so that the model does not "
            "unlearn to think; the rest of them is learnt, the tool's name too. "
            "--learn_no_thinking true learns it as well."
        )
    if not data_args.learn_past_thinking:
        sentences.append("Not learnt: the thinking of earlier turns (--learn_past_thinking false).")
    return sentences


def left_out_in_words(tokens: Dataset, *, max_length: int | None, is_cut: bool) -> list[str]:
    """How many samples are left out or cut, and why."""
    is_long, is_empty = lengths_of(tokens) > (max_length or np.inf), num_in_loss(tokens) == 0
    total, sentences = len(tokens), []
    if is_long.any():
        action = "Cut" if is_cut else "Left out"
        sentences.append(
            f"{action}: {is_long.sum():,} of {total:,} samples are longer than --max_length "
            f"{max_length:,}."
        )
    if (is_empty & ~is_long).any():
        sentences.append(
            f"Left out: {(is_empty & ~is_long).sum():,} of {total:,} samples have no token in the "
            "loss."
        )
    return sentences


def what_looks_wrong(
    rows: Dataset,
    tokens: Dataset,
    counts: Counts,
    *,
    max_length: int | None = None,
    is_repeated_on_purpose: bool = False,
) -> list[str]:
    """One sentence for each thing that a person should look at; empty if all looks right.

    is_repeated_on_purpose: by a weight behind a source of more than 1.
    """
    lengths, in_loss = lengths_of(tokens), num_in_loss(tokens)
    found = []
    share = in_loss.sum() / max(lengths.sum(), 1)
    if share < FEW_IN_LOSS:
        found.append(
            f"Only {share:.2%} of the tokens are in the loss: are the answers in the assistant's "
            "messages, and is nothing masked (`weight`, `loss`) that should be learnt?"
        )
    is_empty = (in_loss == 0).mean()
    if is_empty > MANY_LEFT_OUT:
        found.append(f"In {is_empty:.0%} of the samples nothing is in the loss.")
    is_long = (lengths > (max_length or np.inf)).mean()
    if is_long > MANY_LEFT_OUT:
        enough = int(np.percentile(lengths, 95))
        found.append(
            f"{is_long:.0%} of the samples are longer than --max_length {max_length:,}: 95% would "
            f"fit into {enough:,}."
        )
    found += thinking_looks_wrong(counts)
    if counts.num_repeated > MANY_REPEATED * len(rows) and not is_repeated_on_purpose:
        found.append(
            f"{counts.num_repeated:,} of {len(rows):,} conversations are equal to an earlier one: "
            "they count more, and a share held out at random is no longer unseen."
        )
    warnings = first_warnings(rows)
    found += warnings[:MAX_WARNINGS]
    if len(warnings) > MAX_WARNINGS:
        found.append("There are more texts with another format's markup: the `warning:` lines.")
    return found


def thinking_looks_wrong(counts: Counts) -> list[str]:
    if not counts.num_turns or counts.num_with_thinking >= FEW_THINKING * counts.num_turns:
        return []
    shown = f"{counts.num_with_thinking:,}" if counts.num_with_thinking else "None"
    return [
        f"{shown} of {counts.num_turns:,} turns have thinking. gpt-oss thinks before it answers; "
        "how to think for this data is not learnt. If the data has thoughts, put them into "
        "`thinking`."
    ]


def lengths_of(tokens: Dataset) -> Any:
    return tokens.data["num_tokens"].to_numpy()


def num_in_loss(tokens: Dataset) -> Any:
    return tokens.data["num_loss_tokens"].to_numpy()
