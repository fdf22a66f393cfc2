"""Generates turns from prompts like those of vLLM's server, and counts how many are valid."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.data.harmony import (
    CALL,
    END_OF_TEXT,
    RETURN,
    START,
    Encoder,
    Piece,
    to_messages,
    to_pieces,
)
from finetune.data.harmony_parser import ChannelReader, Turn
from finetune.data.options import DataArguments
from finetune.evaluation.language import LANGUAGES, language_of, requested_language

BATCH_SIZE = 8  # prompts that are answered at once


@dataclass
class Prompt:
    """A conversation up to its last user turn, with the opening of the answer: token ids.

    question: the text of that user turn. language: the one that the system or developer message
    asks the analysis to be in, if any.
    """

    ids: list[int]
    question: str
    has_tools: bool
    language: str | None


def make_prompt(
    conversation: dict[str, Any], encoder: Encoder, data_args: DataArguments
) -> Prompt | None:
    """The prompt of a conversation; None for plain text and where no turn is a user's."""
    turns = conversation.get("messages") or []
    users = [number for number, turn in enumerate(turns) if turn["role"] == "user"]
    if not users:
        return None
    turns = turns[: users[-1] + 1]
    messages = to_messages(
        conversation | {"messages": turns},
        date=data_args.conversation_start_date,
        reasoning_effort=data_args.reasoning_effort,
    )
    opening = [Piece(START, True, False), Piece("assistant", False, False)]
    instructing = [turn["content"] for turn in turns if turn["role"] in ("system", "developer")]
    return Prompt(
        ids=encoder.encode([[*to_pieces(messages), *opening]])[0][0],
        question=turns[-1]["content"],
        has_tools=bool(conversation.get("tools")),
        language=requested_language("\n".join(instructing)),
    )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    *,
    max_new_tokens: int,
) -> list[list[int]]:
    """The token ids that follow each prompt, up to and with the one that ends the turn.

    Greedy: always the likeliest token. Prompts of a batch are padded on the left.
    """
    vocabulary, pad = tokenizer.get_vocab(), tokenizer.pad_token_id
    ends = [vocabulary[token] for token in (RETURN, CALL, END_OF_TEXT)]
    generated: list[list[int]] = []
    for first in range(0, len(prompts), BATCH_SIZE):
        rows = [prompt.ids for prompt in prompts[first : first + BATCH_SIZE]]
        width = max(map(len, rows))
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with eager_attention(model):
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=ends,
                pad_token_id=pad,
            )
        generated += [until_end(row, ends) for row in output[:, width:].tolist()]
    return generated


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model attend by the implementation that handles a cache and padding on the left.

    choose_attention compares the others with eager on packed rows, without a cache.
    """
    config = model.config
    chosen = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        # The same model is scored next, as the base of an adapter. Its rows are packed, and eager
        # attention would let their conversations see each other.
        config._attn_implementation = chosen


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    """The ids up to the first that ends a turn; what follows is padding."""
    last = next((number for number, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: last + 1]


def read_turns(
    generated: list[list[int]], prompts: list[Prompt], reader: ChannelReader
) -> list[Turn]:
    pairs = zip(generated, prompts, strict=True)
    return [reader.read(ids, has_tools=prompt.has_tools) for ids, prompt in pairs]


def shares(
    turns: list[Turn], generated: list[list[int]], prompts: list[Prompt], *, max_new_tokens: int
) -> dict[str, float | None]:
    """Shares of the turns, 0 to 1, or None where there is nothing to count.

    valid_harmony and cut_short (at max_new_tokens) are shares of all turns. analysis_in_language is
    a share of the analyses that were asked for in a language that language.py can recognise.
    """
    asked = [
        prompt.language == language_of(turn.text("analysis"))
        for turn, prompt in zip(turns, prompts, strict=True)
        if prompt.language in LANGUAGES and turn.text("analysis").strip()
    ]
    cut = [
        turn.problem is not None and len(ids) == max_new_tokens
        for turn, ids in zip(turns, generated, strict=True)
    ]
    return {
        "valid_harmony": share([turn.problem is None for turn in turns]),
        "cut_short": share(cut),
        "analysis_in_language": share(asked),
    }


def share(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None
