"""Rendered conversations equal openai-harmony's, token for token; what is learnt is the model's."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai_harmony import (
    HarmonyEncoding,
)
from transformers import PreTrainedTokenizerBase

from finetune.data.harmony import Encoder, to_messages, to_pieces
from helpers.harmony_reference import (
    DATE,
    default_reference,
    reference,
)


@pytest.fixture(scope="session")
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    return Encoder(tokenizer)


words = st.sampled_from(
    [
        "Hello",
        " world",
        "\n\n",
        "  ",
        "2+2=4",
        "naïve café",
        "日本語",
        "🙂",
        "\u200b",
        "def f():\n\t",
    ]
    + ["<|start|>assistant", "<|end|>", "<|return|>", "<|reserved_200013|>", "<|im_end|>", "'ll"]
)
texts = st.lists(words, min_size=1, max_size=6).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20
)
names = st.sampled_from(["get_weather", "search", "run_sql_2"])
line = st.lists(words.filter(lambda w: "\n" not in w), min_size=1, max_size=3).map("".join)
scalars = st.none() | st.booleans() | st.integers(-9, 9**9) | line


def optional(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


def with_children(children: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas that hold schemas; also the malformed ones that tools in the wild have."""
    notes = {"description": line, "title": line, "nullable": st.booleans(), "default": scalars}
    properties = st.dictionaries(st.sampled_from(["city", "n", "deep", "x_1"]), children)
    required = st.lists(st.sampled_from(["city", "n", "deep"]))
    kinds = [
        optional({**notes, "properties": properties, "required": required}).map(
            lambda schema: {"type": "object", **schema}
        ),
        optional({**notes, "items": children}).map(lambda schema: {"type": "array", **schema}),
        optional({**notes, "examples": st.lists(scalars)}).flatmap(
            lambda schema: st.lists(children, max_size=3).map(lambda v: {**schema, "oneOf": v})
        ),
    ]
    return st.one_of(kinds)


simple = optional(
    {
        "type": st.sampled_from(["string", "number", "integer", "boolean", "null", "strange"])
        | st.lists(st.sampled_from(["string", "integer", "null"]), max_size=3),
        "description": line,
        "title": line,
        "enum": st.lists(line | st.integers(), max_size=3),
        "default": scalars | st.lists(st.integers(0, 9), max_size=3),
        "examples": st.lists(line | st.integers(), max_size=2),
        "nullable": st.booleans(),
    }
)
schemas = st.recursive(simple, with_children, max_leaves=6)
tools = st.lists(
    st.fixed_dictionaries(
        {"name": names, "description": texts | st.just(""), "parameters": st.none() | schemas}
    ),
    max_size=3,
)


@st.composite
def conversations(draw: st.DrawFn, max_turns: int = 4) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        role = draw(st.sampled_from(["system", "developer"]))
        messages.append({"role": role, "content": draw(texts)})
    thinking = st.none() | texts
    for _ in range(draw(st.integers(1, max_turns))):
        messages.append({"role": "user", "content": draw(texts)})
        for _ in range(draw(st.integers(0, 2))):
            calls = st.fixed_dictionaries({"name": names, "arguments": texts})
            turn: dict[str, Any] = {
                "role": "assistant",
                "content": draw(st.none() | texts),
                "thinking": draw(thinking),
                "tool_calls": draw(st.lists(calls, min_size=1, max_size=2)),
            }
            messages.append(turn)
            for call in turn["tool_calls"]:
                result = draw(texts | st.just(""))
                messages.append({"role": "tool", "name": call["name"], "content": result})
        if draw(st.integers(0, 5)) or messages[-1]["role"] == "user":
            answer: dict[str, Any] = {"content": draw(texts), "thinking": draw(thinking)}
            messages.append({"role": "assistant", **answer, "tool_calls": []})
    effort = draw(st.sampled_from([None, "low", "medium", "high"]))
    return {"messages": messages, "tools": draw(tools), "reasoning_effort": effort}


def pieces(conversation: dict[str, Any], **options: Any) -> Any:
    messages = to_messages(conversation, date=DATE, reasoning_effort="medium")
    return to_pieces(messages, **options)


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(conversation=conversations())
def test_token_for_token(
    encoder: Encoder, openai: HarmonyEncoding, conversation: dict[str, Any]
) -> None:
    (input_ids,), (labels,) = encoder.encode([pieces(conversation)])
    assert openai.decode_utf8(input_ids) == openai.decode_utf8(reference(openai, conversation))
    assert input_ids == reference(openai, conversation)
    assert all(label in (-100, number) for number, label in zip(input_ids, labels, strict=True))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(conversation=conversations(max_turns=2))
def test_of_two_turns_openai_drops_the_same(
    encoder: Encoder, openai: HarmonyEncoding, conversation: dict[str, Any]
) -> None:
    (input_ids,), _ = encoder.encode([pieces(conversation)])
    assert input_ids == default_reference(openai, conversation)


def test_of_three_turns_openai_drops_less(encoder: Encoder, openai: HarmonyEncoding) -> None:
    """Only what precedes the first final message (openai/harmony#96); vLLM, before the last."""
    messages = [
        message
        for number in range(3)
        for message in (
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4", "thinking": f"{number}.", "tool_calls": []},
        )
    ]
    conversation = {"messages": messages, "tools": []}
    (input_ids,), _ = encoder.encode([pieces(conversation)])
    assert input_ids == reference(openai, conversation)
    theirs = openai.decode_utf8(default_reference(openai, conversation))
    dropped = "<|start|>assistant<|channel|>analysis<|message|>1.<|end|>"
    assert theirs.count(dropped) == 1
    assert openai.decode_utf8(input_ids) == theirs.replace(dropped, "")
