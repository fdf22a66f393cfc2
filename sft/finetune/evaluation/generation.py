"""Turns that a model writes when it is asked as vLLM asks it, and what is to be said of them."""

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

BATCH_SIZE = 8  # prompts at a time


@dataclass
class Prompt:
    """A conversation up to its last user turn. language: in which it asks for its analysis."""

    ids: list[int]
    question: str
    has_tools: bool
    language: str | None


def make_prompt(
    conversation: dict[str, Any], encoder: Encoder, data_args: DataArguments
) -> Prompt | None:
    """None for plain text, and for what has no user's turn."""
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
    """The likeliest token each time; what follows the prompts, up to the token that ends it."""
    vocabulary, pad = tokenizer.get_vocab(), tokenizer.pad_token_id
    ends = [vocabulary[token] for token in (RETURN, CALL, END_OF_TEXT)]
    written: list[list[int]] = []
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
        written += [until_end(row, ends) for row in output[:, width:].tolist()]
    return written


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """The one implementation known to be right with a cache and with padding on the left."""
    config = model.config
    chosen = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        # It may be the base of the next model, whose packed rows eager would not keep apart.
        config._attn_implementation = chosen


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    """Without the padding behind the first of the tokens that end a turn."""
    last = next((number for number, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: last + 1]


def read_turns(
    written: list[list[int]], prompts: list[Prompt], reader: ChannelReader
) -> list[Turn]:
    pairs = zip(written, prompts, strict=True)
    return [reader.read(ids, has_tools=prompt.has_tools) for ids, prompt in pairs]


def shares(
    turns: list[Turn], written: list[list[int]], prompts: list[Prompt], *, max_new_tokens: int
) -> dict[str, float | None]:
    """Of the turns, 0 to 1: how many are valid harmony, and how many were cut at max_new_tokens;
    of the analyses that were asked for in a language that language.py knows, how many are in it.

    None: there was nothing to count.
    """
    asked = [
        prompt.language == language_of(turn.text("analysis"))
        for turn, prompt in zip(turns, prompts, strict=True)
        if prompt.language in LANGUAGES and turn.text("analysis").strip()
    ]
    cut = [
        turn.problem is not None and len(ids) == max_new_tokens
        for turn, ids in zip(turns, written, strict=True)
    ]
    return {
        "valid_harmony": share([turn.problem is None for turn in turns]),
        "cut_short": share(cut),
        "analysis_in_language": share(asked),
    }


def share(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None
