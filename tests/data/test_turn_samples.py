"""Each turn is learnt once, in exactly the prompt that the server makes for it."""

from typing import Any

import pytest
from hypothesis import given, settings
from openai_harmony import HarmonyEncoding
from transformers import PreTrainedTokenizerBase

from finetune.data.conversations import to_conversation
from finetune.data.harmony import Encoder, all_messages, to_messages, to_pieces
from finetune.data.options import TrainOn
from finetune.data.turn_samples import split_samples
from helpers.harmony_reference import DATE, reference
from helpers.harmony_strategies import SLOW, conversations
from helpers.rows import ASSISTANT, CALL, RESULT, USER, WITHOUT_THINKING

RENDERING: dict[str, Any] = {"date": DATE, "reasoning_effort": "medium"}
CALLING = {**ASSISTANT, "thinking": "Add.", "content": None, "tool_calls": [CALL]}
LEARNT_CALL = (
    "<|channel|>analysis<|message|>Add.<|end|><|start|>assistant"
    "<|channel|>commentary to=functions.add <|constrain|>json<|message|>{}<|call|>"
)


def thinking(thought: str) -> dict[str, Any]:
    return {**ASSISTANT, "thinking": thought}


def learnt(thought: str) -> str:
    return (
        f"<|channel|>analysis<|message|>{thought}<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|return|>"
    )


def texts_of(*turns: object, train_on: TrainOn = "assistant") -> list[tuple[str, str]]:
    """Of each sample: the text before what is first in the loss, and all that is in the loss."""
    conversation = to_conversation({"messages": list(turns)})
    texts = []
    for sample in split_samples(all_messages(conversation, **RENDERING), train_on):
        pieces = to_pieces(sample.messages, train_on, first_learnt=sample.first_learnt)
        first = next((n for n, piece in enumerate(pieces) if piece.in_loss), len(pieces))
        context = "".join(piece.text for piece in pieces[:first])
        texts.append((context, "".join(piece.text for piece in pieces if piece.in_loss)))
    return texts


def learnt_texts(*turns: object, train_on: TrainOn = "assistant") -> list[str]:
    return [text for _, text in texts_of(*turns, train_on=train_on)]


def test_k_turns_with_thinking_make_k_samples_without_the_thinking_of_earlier_turns() -> None:
    turns = [turn for thought in "abc" for turn in (USER, thinking(thought))]
    question = "<|start|>user<|message|>2+2?<|end|><|start|>assistant"
    answer = "<|channel|>final<|message|>4<|end|>"
    for number, (context, text) in enumerate(texts_of(*turns)):
        assert context.endswith(f"<|end|>{(question + answer) * number}{question}")
        assert text == learnt("abc"[number])
        assert "analysis<|message|>" not in context


def test_a_turn_without_thinking_is_learnt_with_the_next_one_that_has_some() -> None:
    anyway = "<|channel|><|message|>4"
    turns = [USER, WITHOUT_THINKING, USER, thinking("a"), USER, WITHOUT_THINKING]
    assert learnt_texts(*turns) == [f"{anyway}<|end|>{learnt('a')}", f"{anyway}<|return|>"]
    assert learnt_texts(*turns[:4]) == [f"{anyway}<|end|>{learnt('a')}"]
    assert learnt_texts(USER, WITHOUT_THINKING) == [f"{anyway}<|return|>"]


def test_a_chain_of_calls_keeps_its_thinking_until_the_final_answer() -> None:
    """That of a turn which the user broke off is in the next prompt too, and so they share it."""
    chain = [USER, CALLING, RESULT, thinking("a")]
    assert learnt_texts(*chain, USER, thinking("b")) == [LEARNT_CALL + learnt("a"), learnt("b")]
    broken_off = [USER, CALLING, RESULT]
    assert learnt_texts(*broken_off, USER, thinking("b")) == [LEARNT_CALL + learnt("b")]


def test_a_turn_that_is_not_in_the_loss_makes_no_sample() -> None:
    unlearnt = {**thinking("a"), "weight": 0}
    assert learnt_texts(USER, unlearnt, USER, thinking("b")) == [learnt("b")]
    assert learnt_texts(USER, thinking("b"), USER, unlearnt) == [learnt("b")]
    assert learnt_texts(USER, unlearnt) == [""]
    two = [USER, thinking("a"), USER, thinking("b")]
    assert learnt_texts(*two, train_on="last_turn") == [learnt("b")]


def test_of_everything_each_message_is_learnt_once() -> None:
    first, second = learnt_texts(USER, thinking("a"), USER, thinking("b"), train_on="everything")
    assert first.startswith("<|start|>system") and first.endswith(learnt("a"))
    assert second == f"<|start|>user<|message|>2+2?<|end|><|start|>assistant{learnt('b')}"


def until_user(conversation: dict[str, Any], number: int) -> dict[str, Any]:
    """The conversation up to the end of the turn that answers the user's message `number`."""
    turns = conversation["messages"]
    users = [n for n, turn in enumerate(turns) if turn["role"] == "user"]
    return conversation | {"messages": turns[: [*users, len(turns)][number]]}


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    return Encoder(tokenizer)


@settings(SLOW, max_examples=200)
@given(conversation=conversations())
def test_a_sample_is_vllms_prompt_for_its_last_turn_and_that_turn(
    encoder: Encoder, vllms: HarmonyEncoding, conversation: dict[str, Any]
) -> None:
    for messages, _ in split_samples(all_messages(conversation, **RENDERING)):
        number = sum(message.author == "user" for message in messages)
        expected = reference(vllms, until_user(conversation, number))
        assert encoder.encode([to_pieces(messages)])[0][0] == expected


@settings(SLOW, max_examples=200)
@given(conversation=conversations())
def test_the_samples_hold_what_each_turn_learns_in_its_own_prompt(
    conversation: dict[str, Any],
) -> None:
    """Token for token: at the end of an answer <|return|>, even where its prompt has <|end|>."""
    of_samples = [
        piece
        for sample in split_samples(all_messages(conversation, **RENDERING))
        for piece in to_pieces(sample.messages, first_learnt=sample.first_learnt)
    ]
    num_users = sum(turn["role"] == "user" for turn in conversation["messages"])
    of_turns = [
        piece
        for number in range(1, num_users + 1)
        for piece in to_pieces(
            to_messages(until_user(conversation, number), **RENDERING), "last_turn"
        )
    ]
    learnt_by = [
        [piece.learnt_as or piece.text for piece in pieces if piece.in_loss]
        for pieces in (of_samples, of_turns)
    ]
    assert learnt_by[0] == learnt_by[1]
