# ruff: noqa: E501
"""Rows of every shape become the same conversation; those that are none are described."""

from typing import Any

import pytest

from finetune.data.conversations import BadRow, shape_of, to_conversation

USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "thinking": "Easy.", "content": "4"}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "4"}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def said(row: dict[str, Any]) -> list[tuple[str, str, str | None]]:
    messages = to_conversation(row)["messages"]
    return [(m["role"], m["content"], m.get("thinking")) for m in messages]


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("messages", {"messages": [USER, ASSISTANT]}),
        ("messages", {"messages": [USER, {**ASSISTANT, "thinking": None, "reasoning": "Easy."}]}),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, ASSISTANT]},
        ),
        (
            "messages",
            {"messages": '[{"role": "user", "content": "2+2?"}, {"role": "assistant", '
             '"content": "4", "reasoning_content": "Easy."}]'},
        ),
        (
            "ShareGPT conversations",
            {
                "conversations": [
                    {"from": "human", "value": "2+2?"},
                    {"from": "gpt", "value": "4", "thinking": "Easy."},
                ]
            },
        ),
        ("prompt and completion", {"prompt": "2+2?", "completion": [ASSISTANT]}),
        ("prompt and completion", {"prompt": [USER], "completion": [ASSISTANT]}),
        ("Alpaca instructions", {"instruction": "2+2?", "input": "", "output": "4", "thinking": "Easy."}),
        ("user, analysis and final", {"user": "2+2?", "analysis": "Easy.", "final": "4"}),
    ],
)  # fmt: skip
def test_every_shape_is_the_same_conversation(shape: str, row: dict[str, Any]) -> None:
    assert shape_of(row) == shape
    assert said(row) == [("user", "2+2?", None), ("assistant", "4", "Easy.")]


def test_a_shape_needs_values_not_only_columns() -> None:
    row = {"messages": None, "prompt": "2+2?", "completion": "4"}
    assert said(row) == [("user", "2+2?", None), ("assistant", "4", None)]
    assert to_conversation({"text": "Once upon a time"}) == {"text": "Once upon a time"}


def test_columns_that_instruct() -> None:
    alpaca = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."}
    assert said(alpaca)[:2] == [("developer", "Be brief.", None), ("user", "Add.\n\n2, 2", None)]
    columns = {
        "reasoning_language": "Dutch",
        "developer": "Be brief.",
        "user": "2+2?",
        "final": "4",
    }
    assert said(columns)[0][1] == "reasoning language: Dutch\n\nBe brief."
    turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    assert said({"conversations": turns, "system": "Be brief."})[0][:2] == ("system", "Be brief.")


def test_what_is_not_to_be_learnt() -> None:
    earlier = [USER, ASSISTANT, {"role": "user", "content": "And 3+3?"}]
    messages = to_conversation({"prompt": earlier, "completion": "6"})["messages"]
    assert [m.get("in_loss", True) for m in messages] == [False, False, False, True]
    messages = to_conversation({"messages": [USER, {**ASSISTANT, "weight": 0}]})["messages"]
    assert messages[1]["in_loss"] is False


def test_tools_calls_and_results() -> None:
    flat_call = {"name": "functions.add", "arguments": {"a": 2}}
    for calls in ([CALL], [flat_call]):
        turns = [USER, {"role": "assistant", "tool_calls": calls}, RESULT, ASSISTANT]
        conversation = to_conversation({"messages": turns, "tools": [ADD]})
        assert conversation["messages"][1]["tool_calls"] == [
            {"name": "add", "arguments": '{"a": 2}'}
        ]
        assert conversation["messages"][2]["name"] == "add"
        assert conversation["tools"][0]["parameters"] == {"type": "object"}
    sharegpt = [
        {"from": "human", "value": "2+2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "4"},
    ]
    messages = to_conversation({"conversations": sharegpt})["messages"]
    assert messages[1]["tool_calls"] == [{"name": "add", "arguments": '{"a": 2}'}]


def test_results_are_those_of_the_calls_they_answer() -> None:
    calls = [{"id": name, "function": {"name": name, "arguments": "{}"}} for name in ("a", "b")]
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in ("b", "a")]
    turns = [USER, {"role": "assistant", "tool_calls": calls}, *results, ASSISTANT]
    messages = to_conversation({"messages": turns})["messages"]
    assert [(m["name"], m["content"]) for m in messages if m["role"] == "tool"] == [
        ("b", "b"),
        ("a", "a"),
    ]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "2+2?"}, "the columns question are of no known shape"),
        ({"messages": []}, "no list of objects with `role`"),
        ({"messages": "hello"}, "no list of objects"),
        ({"messages": ["hello"]}, "no list of objects"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0] has the role 'robot'"),
        ({"messages": [{"content": "x"}]}, "messages[0] has the role None"),
        ({"messages": [{**USER, "content": 7}, ASSISTANT]}, "messages[0] has the number 7 as"),
        ({"messages": [{**USER, "content": {"a": 1}}, ASSISTANT]}, "messages[0] has an object as"),
        ({"messages": [{**USER, "content": None}, ASSISTANT]}, "messages[0] has empty `content`"),
        ({"messages": [{**USER, "content": " \n"}, ASSISTANT]}, "messages[0] has empty `content`"),
        ({"messages": [USER, {**ASSISTANT, "content": ""}]}, "messages[1] has empty `content`"),
        ({"messages": [USER, {**ASSISTANT, "thinking": 7}]}, "the number 7 as `thinking`"),
        ({"messages": [USER]}, "no assistant message, so nothing to learn"),
        ({"messages": [USER, ASSISTANT, USER]}, "messages[2]: the last message is not the assistant's"),
        ({"messages": [USER, USER, ASSISTANT]}, "messages[1]: two user messages in a row"),
        ({"messages": [ASSISTANT]}, "messages[0]: the assistant speaks before a user has"),
        (
            {"messages": [USER, {"role": "system", "content": "x"}, ASSISTANT]},
            "messages[1]: a system message after the conversation has begun",
        ),
        ({"messages": [USER, RESULT, ASSISTANT]}, "messages[1]: a tool's result, but no call"),
        ({"messages": [USER, CALLING, RESULT, RESULT, ASSISTANT]}, "messages[3]: a tool's result"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, "tool_calls[0] has no function `name`"),
        ({"messages": [{**USER, "tool_calls": [CALL]}, ASSISTANT]}, "only the assistant calls tools"),
        ({"messages": [USER, ASSISTANT], "tools": [{}]}, "tools[0] has no `name`"),
        ({"messages": [USER, ASSISTANT], "reasoning_effort": "most"}, "not one of low, medium, high"),
        ({"messages": [{**USER, "content": "\ud800"}, ASSISTANT]}, "half a surrogate pair"),
        ({"conversations": [{"from": "human", "value": 7}]}, "conversations[0] has the number 7"),
        ({"instruction": 7, "output": "4"}, "instruction has the number 7"),
        ({"instruction": "2+2?", "output": " "}, "output has empty `content`"),
        ({"prompt": "2+2?", "completion": True}, "completion[0] has true or false"),
        ({"text": 7}, "`text` is the number 7"),
        ({"text": "<|start|>system<|message|>"}, "`text` is rendered already"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_described(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRow) as error:
        to_conversation(row)
    assert any(problem in text for text in error.value.args), error.value.args


def test_every_problem_of_a_row_is_named() -> None:
    row = {"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": ""}]}
    with pytest.raises(BadRow) as error:
        to_conversation(row)
    assert len(error.value.args) == 2
