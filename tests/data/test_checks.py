# ruff: noqa: E501
"""Rows that are not conversations are refused, and the message names the field at fault."""

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest

from finetune.data.conversations import BadRow, to_conversation
from helpers.rows import ASSISTANT, CALL, RESULT, USER

CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def calling(arguments: object) -> dict[str, Any]:
    call = {"name": "add", "arguments": arguments}
    return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": []}, "there are no messages in `messages`"),
        ({"messages": "hello"}, "messages is text that is not JSON, not an object"),
        ({"messages": ["hello"]}, "messages[0] is text that is not JSON"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0] has the role 'robot'"),
        ({"messages": [{"content": "x"}]}, "messages[0] has no `role`; its keys are content"),
        ({"messages": [{**USER, "content": 7}, ASSISTANT]}, "messages[0] has the number 7 as"),
        ({"messages": [{**USER, "content": {"a": 1}}, ASSISTANT]}, "messages[0] has an object as"),
        ({"messages": [{**USER, "content": None}, ASSISTANT]}, "messages[0] has empty `content`"),
        ({"messages": [{**USER, "content": " \n"}, ASSISTANT]}, "messages[0] has empty `content`"),
        ({"messages": [USER, {**ASSISTANT, "content": ""}]}, "messages[1] has thinking alone, and no"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "messages[1] has empty `content`"),
        ({"messages": [USER, {**ASSISTANT, "thinking": 7}]}, "the number 7 as `thinking`"),
        ({"messages": [USER]}, "there is no assistant message"),
        ({"messages": [USER, ASSISTANT, ASSISTANT]}, "messages[2]: two assistant messages in a row"),
        ({"messages": [ASSISTANT]}, "messages[0]: the assistant speaks before a user has"),
        ({"messages": [USER, RESULT, ASSISTANT]}, "messages[1]: a tool's result that answers no call"),
        ({"messages": [USER, CALLING, RESULT, RESULT, ASSISTANT]}, "messages[3]: a tool's result"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}]}, "tool_calls[0] has no function `name`"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": 7}]}, "messages[1] has the number 7 as `tool_calls`"),
        (
            {"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "add", "arguments": 7}]}]},
            "tool_calls[0] has `arguments` that are neither object nor text",
        ),
        ({"messages": [{**USER, "tool_calls": [CALL]}, ASSISTANT]}, "only the assistant calls tools"),
        ({"messages": [USER, CALLING, {"role": "tool"}, ASSISTANT]}, "what did the tool return?"),
        ({"messages": [USER, ASSISTANT], "tools": [{}]}, "tools[0] has no `name`"),
        ({"messages": [USER, ASSISTANT], "tools": 7}, "`tools` is the number 7, not a list"),
        ({"messages": [USER, ASSISTANT], "reasoning_effort": "most"}, "not one of low, medium, high"),
        ({"messages": [{**USER, "content": "\ud800"}, ASSISTANT]}, "half a surrogate pair"),
        ({"messages": [USER, CALLING, {**RESULT, "name": "\ud800"}, ASSISTANT]}, "messages[2] has half a surrogate pair in its `name`"),
        ({"messages": [USER, {**ASSISTANT, "thinking": "\ud800"}]}, "messages[1] has half a surrogate pair in its `thinking`"),
        (calling('{"a": "\\ud800"}'), "messages[1].tool_calls[0] has `arguments` that spell half a surrogate pair"),
        (calling('{"a": NaN}'), "messages[1].tool_calls[0] has `arguments` that are not valid: NaN is no JSON value"),
        (calling('{"a": 1, "a": 2}'), "has `arguments` that are not valid: the key 'a' appears twice in one object"),
        (calling("7"), "has `arguments` that are the number 7, not an object: '7'"),
        (calling("city"), "has `arguments` that are not JSON: 'city'"),
        ({"conversations": [{"from": "human", "value": 7}]}, "conversations[0] has the number 7"),
        ({"instruction": True, "output": "4"}, "instruction has true or false"),
        ({"instruction": "2+2?", "output": " "}, "output has empty `content`"),
        ({"prompt": "2+2?", "completion": True}, "completion has true or false"),
        ({"text": 7}, "`text` is the number 7"),
        ({"text": " "}, "`text` is empty"),
        ({"text": "<|start|>system<|message|>"}, "`text` is rendered already"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_with_the_field_at_fault(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadRow) as error:
        to_conversation(row)
    assert any(problem in text for text in error.value.args), error.value.args


def places_of_texts(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place of a text in lists and objects: what holds it, and its index or key."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        if isinstance(item, dict | list):
            yield from places_of_texts(item)
        elif isinstance(item, str):
            yield value, key


def test_half_a_surrogate_pair_is_refused_or_not_read_wherever_it_stands() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "enum": ["b"]}}}
    tool = {"name": "add", "description": "Adds.", "parameters": schema}
    native = {"role": "assistant", "channel": "final", "recipient": "all", "content": "4"}
    messages = [USER, CALLING, {**RESULT, "name": "add"}, native]
    row = {"messages": messages, "tools": [tool], "system": "S", "reasoning_effort": "low"}
    for number in range(len(list(places_of_texts(row)))):
        copy = deepcopy(row)
        holder, key = list(places_of_texts(copy))[number]
        holder[key] += "\ud800"
        try:
            json.dumps(to_conversation(copy), ensure_ascii=False).encode()
        except BadRow as error:
            assert "\\ud800" in str(error) or "surrogate" in str(error) or "JSON" in str(error)


def test_every_problem_of_a_row_is_named() -> None:
    row = {"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": ""}]}
    with pytest.raises(BadRow) as error:
        to_conversation(row)
    assert len(error.value.args) == 2
