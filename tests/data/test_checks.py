# ruff: noqa: E501
"""Rows that are not conversations are refused, and the message names the field at fault."""

from typing import Any

import pytest

from finetune.data.conversations import BadRow, to_conversation
from helpers.rows import ASSISTANT, CALL, RESULT, USER

CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}


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


def test_every_problem_of_a_row_is_named() -> None:
    row = {"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": ""}]}
    with pytest.raises(BadRow) as error:
        to_conversation(row)
    assert len(error.value.args) == 2
