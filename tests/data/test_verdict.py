"""The preview's verdict: what is learnt, and what looks wrong, each found where it is planted."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from finetune.data.dataset import load_conversations, render_all
from finetune.data.options import DataArguments
from finetune.data.verdict import (
    count_turns,
    learnt_in_words,
    left_out_in_words,
    what_looks_wrong,
)
from helpers.paths import CONVERSATIONS
from helpers.rows import ASSISTANT, CALL, RESULT, USER, WITHOUT_THINKING, write_rows
from tiny_gpt_oss import conversation_texts, make_tokenizer

OPTIONS = DataArguments(conversation_start_date="2026-01-02")


@pytest.fixture(scope="module")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer(conversation_texts(CONVERSATIONS))


def asking(question: object, *turns: object) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": str(question)}, *turns]}


GOOD = [asking(number, ASSISTANT) for number in range(20)]
LONG = [asking(f"{number} {'word ' * 600}", ASSISTANT) for number in range(20)]


def wrong_with(
    rows: list[Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> list[str]:
    loaded = load_conversations(str(write_rows(tmp_path / "my.jsonl", *rows)))
    tokens = render_all(loaded, tokenizer, OPTIONS)
    return what_looks_wrong(loaded, tokens, count_turns(loaded), **options)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([asking(n, {**ASSISTANT, "weight": 0}) for n in range(9)], "tokens are in the loss"),
        (LONG[:1] + GOOD[1:15] + [asking(n, {**ASSISTANT, "loss": False}) for n in range(20, 25)],
         "In 25% of the samples nothing"),
        (GOOD[:10] + LONG[10:], "50% of the samples are longer than --max_length 500: 95%"),
        ([asking(n, WITHOUT_THINKING) for n in range(9)], "None of 9 turns have thinking"),
        (GOOD + GOOD[:5], "5 of 25 conversations are equal to an earlier one"),
        ([asking(n, {**ASSISTANT, "content": "a <think> b"}) for n in range(9)], "my.jsonl:1: "),
    ],
)  # fmt: skip
def test_what_is_planted_is_found(
    rows: list[Any], words: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    found = wrong_with(rows, tmp_path, tiny_tokenizer, max_length=500)
    assert any(words in sentence for sentence in found), found


def test_of_good_data_nothing_looks_wrong(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert wrong_with(GOOD + LONG, tmp_path, tiny_tokenizer) == []
    twice = GOOD + GOOD
    assert wrong_with(twice, tmp_path, tiny_tokenizer, is_repeated_on_purpose=True) == []


def test_it_says_what_is_learnt_and_what_is_left_out(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    calling = {"role": "assistant", "tool_calls": [CALL]}
    rows = [
        {"messages": [USER, calling, RESULT, WITHOUT_THINKING]},
        {"messages": [USER, {**ASSISTANT, "weight": 0}]},
        LONG[0],
    ]
    loaded = load_conversations(str(write_rows(tmp_path / "my.jsonl", *rows)))
    tokens = render_all(loaded, tiny_tokenizer, OPTIONS)
    counts = count_turns(loaded)
    assert counts == (3, 2, 1, 0)
    said = " ".join(learnt_in_words(tokens, counts, OPTIONS))
    assert "which tool is called, and with what: there are 1 calls" in said
    assert "Not learnt: whether to think, in 2 messages" in said
    assert left_out_in_words(tokens, max_length=500, is_cut=False) == [
        "Left out: 1 of 3 samples are longer than --max_length 500.",
        "Left out: 1 of 3 samples have no token in the loss.",
    ]
    assert left_out_in_words(tokens, max_length=500, is_cut=True)[0].startswith("Cut: 1 of 3")
