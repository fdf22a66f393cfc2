"""Prompts are what a server sends; turns end where they end; shares count what they say."""

import json

from openai_harmony import HarmonyEncoding
from transformers import PreTrainedTokenizerBase

from channels import Turn
from conftest import CONVERSATIONS
from conversations import to_conversation
from flags import DataArguments
from generation import Prompt, make_prompt, shares, until_end
from harmony import Encoder
from test_harmony import DATE, openai, reference, tokenizer  # noqa: F401


def test_a_prompt_is_what_the_server_sends(
    openai: HarmonyEncoding,  # noqa: F811
    tokenizer: PreTrainedTokenizerBase,  # noqa: F811
) -> None:
    encoder, data_args = Encoder(tokenizer), DataArguments(conversation_start_date=DATE)
    opening = openai.encode("<|start|>assistant", allowed_special="all")
    for line in CONVERSATIONS.read_text().splitlines()[:40]:
        row = json.loads(line)
        conversation = to_conversation(row)
        prompt = make_prompt(conversation, encoder, data_args)
        assert prompt is not None and prompt.language == row["reasoning_language"]
        turns = conversation["messages"]
        last = max(number for number, turn in enumerate(turns) if turn["role"] == "user")
        asked = conversation | {"messages": turns[: last + 1]}
        assert prompt.ids == [*reference(openai, asked), *opening]
        assert prompt.question == turns[last]["content"] and not prompt.has_tools
    assert make_prompt({"text": "no conversation"}, encoder, data_args) is None


def test_padding_is_cut_off_and_the_end_is_kept() -> None:
    assert until_end([5, 6, 2, 1, 1], [2, 3]) == [5, 6, 2]
    assert until_end([5, 6, 7], [2, 3]) == [5, 6, 7]


def test_shares() -> None:
    french, klingon = (Prompt([], "?", False, language) for language in ("French", "Klingon"))
    turns = [
        Turn([("analysis", "Il faut dire que non."), ("final", "No.")]),
        Turn([("analysis", "The answer is that it is not.")], "a message is not closed"),
        Turn([("analysis", "nuqneH")]),
        Turn([("final", "No.")], "it ends without a final answer"),
    ]
    written = [[1, 2], [1, 2, 3], [1], [1]]
    counted = shares(turns, written, [french, french, klingon, french], max_new_tokens=3)
    assert counted == {"valid_harmony": 0.5, "cut_short": 0.25, "analysis_in_language": 0.5}
    nothing = shares([], [], [], max_new_tokens=3)
    assert set(nothing.values()) == {None}
