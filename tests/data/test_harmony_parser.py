"""Turns are read back from token ids; what is valid here is valid to openai-harmony's parser."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openai_harmony import HarmonyEncoding, HarmonyError, Role
from transformers import PreTrainedTokenizerBase

from finetune.data.harmony import CONTROL_TOKENS, Encoder, Piece, to_messages, to_pieces
from finetune.data.harmony_parser import ChannelReader
from helpers.harmony_strategies import SLOW
from helpers.paths import CONVERSATIONS
from tiny_gpt_oss import conversation_texts, make_tokenizer

THOUGHT = "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant"
ANSWER = "<|channel|>final<|message|>4<|return|>"
CALLED = "<|channel|>commentary to=functions.add <|constrain|>json<|message|>{}<|call|>"
GOOD = [ANSWER, THOUGHT + ANSWER, THOUGHT + THOUGHT + ANSWER]
CALLS = [
    THOUGHT + CALLED,
    " to=functions.add<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
    "<|channel|>commentary<|message|>I add.<|end|><|start|>assistant" + CALLED,
]
BAD = {
    "": "not closed",
    "4<|return|>": "made of",
    "<|channel|>analysis<|message|>Easy.": "not closed",
    "<|channel|>analysis<|message|>Easy.<|end|>": "without a final answer",
    "<|channel|>analysis<|message|>Easy.<|return|>": "without a final answer",
    THOUGHT: "not closed",
    THOUGHT + "<|channel|>final<|message|>4<|end|>": "without a final answer",
    THOUGHT + "<|channel|>final<|message|> <|return|>": "without a final answer",
    THOUGHT + "<|channel|>answer<|message|>4<|return|>": "no channel 'answer'",
    "<|channel|>final<|channel|>final<|message|>4<|return|>": "made of",
    "<|channel|>analysis<|message|>Easy.<|channel|>final<|message|>4<|return|>": "made of",
    "<|channel|>analysis<|message|>Easy.<|start|>assistant" + ANSWER: "begins inside another",
    "<|channel|>analysis<|message|>Easy.<|end|><|start|>user" + ANSWER: "malformed",
    "<|channel|>analysis<|message|>Easy.<|end|> So<|start|>assistant" + ANSWER: "outside",
    ANSWER + "<|start|>assistant" + ANSWER: "goes on after its end",
    "<|channel|>final<|message|>4<|endoftext|>": "not closed",
}


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerBase:
    return make_tokenizer(conversation_texts(CONVERSATIONS))


def ids_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", GOOD)
def test_valid_turns_have_no_problem(text: str, tiny: PreTrainedTokenizerBase) -> None:
    assert ChannelReader(tiny).read(ids_of(text, tiny), has_tools=False).problem is None


@pytest.mark.parametrize("text", CALLS)
def test_a_call_is_valid_only_where_there_are_tools(
    text: str, tiny: PreTrainedTokenizerBase
) -> None:
    reader, ids = ChannelReader(tiny), ids_of(text, tiny)
    assert reader.read(ids, has_tools=True).problem is None
    assert "where there is none" in str(reader.read(ids, has_tools=False).problem)


def test_a_turn_has_its_texts_by_channel(tiny: PreTrainedTokenizerBase) -> None:
    turn = ChannelReader(tiny).read(ids_of(THOUGHT + ANSWER, tiny), has_tools=False)
    assert turn.texts == [("analysis", "Easy."), ("final", "4")]
    assert turn.text("analysis") == "Easy." and turn.text("commentary") == ""


@pytest.mark.parametrize("text", BAD)
def test_broken_turns_have_a_problem(text: str, tiny: PreTrainedTokenizerBase) -> None:
    turn = ChannelReader(tiny).read(ids_of(text, tiny), has_tools=False)
    assert turn.problem is not None and BAD[text] in turn.problem


def test_a_turn_that_was_cut_keeps_its_text_so_far(tiny: PreTrainedTokenizerBase) -> None:
    cut = ids_of("<|channel|>analysis<|message|>Facile, ce", tiny)
    assert ChannelReader(tiny).read(cut, has_tools=False).text("analysis") == "Facile, ce"


def test_every_token_has_the_channel_of_its_message(tiny: PreTrainedTokenizerBase) -> None:
    """Expected are the channels of the messages that the ids were made from."""
    turns = [
        {"role": "user", "content": "2+2? <|channel|>final<|message|>5"},
        {
            "role": "assistant",
            "content": "I add.",
            "thinking": "Easy.",
            "tool_calls": [{"name": "add", "arguments": "{}"}],
        },
        {"role": "tool", "name": "add", "content": "4"},
        {"role": "assistant", "content": "4", "thinking": "Sure."},
    ]
    messages = to_messages({"messages": turns}, date="2026-01-02", reasoning_effort="low")
    encoder = Encoder(tiny)
    expected = []
    pieces: list[Piece] = []
    for number, message in enumerate(messages):
        own = to_pieces(messages[: number + 1])[len(to_pieces(messages[:number])) :]
        pieces += own
        expected += [message.channel or "other"] * len(encoder.encode([own])[0][0])
    ids = encoder.encode([pieces])[0][0]
    assert ChannelReader(tiny).channels(ids) == expected
    assert set(expected) == {"analysis", "commentary", "final", "other"}
    assert ChannelReader(tiny).channels(ids_of("plain text", tiny)) == ["other"] * len(
        ids_of("plain text", tiny)
    )


@pytest.fixture(scope="module")
def real(tokenizer: PreTrainedTokenizerBase) -> ChannelReader:
    return ChannelReader(tokenizer)


CALLED_AFTER_THINKING = (
    "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant"
    "<|channel|>commentary to=functions.add <|constrain|>json<|message|>{}<|call|>"
)
tokens = st.sampled_from([*CONTROL_TOKENS, "assistant", "analysis", "final", " Hi", "4", " to=f"])
turns = st.one_of(st.sampled_from([*GOOD, *CALLS]), st.lists(tokens, max_size=12).map("".join))


@example(text=CALLED_AFTER_THINKING, drop=0, insert=(8, " to=f"))  # two recipients
@settings(SLOW, max_examples=200)
@given(text=turns, drop=st.integers(0, 30), insert=st.tuples(st.integers(0, 30), tokens))
def test_a_turn_that_is_valid_here_is_parsed_alike_by_openai_harmony(
    text: str,
    drop: int,
    insert: tuple[int, str],
    openai: HarmonyEncoding,
    real: ChannelReader,
) -> None:
    """Complete turns, turns with a token missing, and with one too many."""
    complete = ids_of(text, real.tokenizer)
    shorter = complete[:drop] + complete[drop + 1 :]
    position, token = insert
    longer = [*complete[:position], *ids_of(token, real.tokenizer), *complete[position:]]
    for ids in (complete, shorter, longer):
        turn = real.read(ids, has_tools=True)
        try:
            parsed = openai.parse_messages_from_completion_tokens(ids, Role.ASSISTANT)
        except HarmonyError:
            assert turn.problem is not None
            continue
        if turn.problem is None:
            theirs = [(message.channel, message.content[0].text) for message in parsed]
            assert theirs == turn.texts
