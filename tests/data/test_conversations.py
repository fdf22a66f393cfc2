# ruff: noqa: E501
"""Rows of every known shape become the same conversation."""

from typing import Any

import pytest

from finetune.data.conversations import BadRow, read_row, shape_of, to_conversation
from helpers.rendered import rendered
from helpers.rows import ASSISTANT, CALL, RESULT, USER

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def turns_of(row: dict[str, Any]) -> list[tuple[str, str, str | None]]:
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
def test_every_shape_becomes_the_same_conversation(shape: str, row: dict[str, Any]) -> None:
    assert shape_of(row) == shape
    assert turns_of(row) == [("user", "2+2?", None), ("assistant", "4", "Easy.")]


def test_plain_text_stays_text() -> None:
    assert to_conversation({"text": "Once upon a time"}) == {"text": "Once upon a time"}


def test_a_row_of_no_known_shape_is_refused() -> None:
    with pytest.raises(BadRow, match="the columns question are of no known shape"):
        to_conversation({"question": "2+2?"})


def test_a_column_that_is_null_does_not_count_for_the_shape() -> None:
    row = {"messages": None, "prompt": "2+2?", "completion": "4"}
    assert turns_of(row) == [("user", "2+2?", None), ("assistant", "4", None)]


def test_alpacas_system_and_input_columns_are_used() -> None:
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."}
    assert turns_of(row)[:2] == [("developer", "Be brief.", None), ("user", "Add.\n\n2, 2", None)]


def test_the_reasoning_language_is_put_before_the_developers_text() -> None:
    row = {"reasoning_language": "Dutch", "developer": "Be brief.", "user": "2+2?", "final": "4"}
    assert turns_of(row)[0][1] == "reasoning language: Dutch\n\nBe brief."


def test_a_system_column_is_used_unless_the_messages_have_instructions() -> None:
    turns = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    row = {"conversations": turns, "system": "Be brief."}
    assert turns_of(row)[0][:2] == ("system", "Be brief.")
    own = {"role": "developer", "content": "Be thorough."}
    row = {"messages": [own, USER, ASSISTANT], "system": "Be brief."}
    assert [content for _, content, _ in turns_of(row)] == ["Be thorough.", "2+2?", "4"]


def test_prompts_and_messages_of_weight_0_are_marked_as_not_in_the_loss() -> None:
    earlier = [USER, ASSISTANT, {"role": "user", "content": "And 3+3?"}]
    messages = to_conversation({"prompt": earlier, "completion": "6"})["messages"]
    assert [m.get("in_loss", True) for m in messages] == [False, False, False, True]
    messages = to_conversation({"messages": [USER, {**ASSISTANT, "weight": 0}]})["messages"]
    assert messages[1]["in_loss"] is False


def test_a_prompt_that_a_key_lets_into_the_loss_is_told_of() -> None:
    _, findings = read_row({"messages": [{**USER, "train": True}, ASSISTANT]})
    assert len(findings.notes) == 1 and "`train` on a message that is not" in findings.notes[0]
    assert read_row({"messages": [{**USER, "weight": 0}, ASSISTANT]})[1].notes == []


@pytest.mark.parametrize("call", [CALL, {"name": "functions.add", "arguments": {}}])
def test_tool_calls_are_read_with_and_without_openais_function_object(call: object) -> None:
    turns = [USER, {"role": "assistant", "tool_calls": [call]}, RESULT, ASSISTANT]
    conversation = to_conversation({"messages": turns, "tools": [ADD]})
    assert conversation["messages"][1]["tool_calls"] == [{"name": "add", "arguments": "{}"}]
    assert conversation["messages"][2]["name"] == "add"
    assert conversation["tools"][0]["parameters"] == {"type": "object"}


def test_sharegpts_function_calls_become_tool_calls() -> None:
    turns = [
        {"from": "human", "value": "2+2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "4"},
    ]
    messages = to_conversation({"conversations": turns})["messages"]
    assert messages[1]["tool_calls"] == [{"name": "add", "arguments": '{"a": 2}'}]
    assert messages[2]["name"] == "add"


def test_a_result_is_named_after_the_call_whose_id_it_has() -> None:
    calls = [{"id": name, "function": {"name": name, "arguments": "{}"}} for name in ("a", "b")]
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in ("b", "a")]
    turns = [USER, {"role": "assistant", "tool_calls": calls}, *results, ASSISTANT]
    messages = to_conversation({"messages": turns})["messages"]
    assert [(m["name"], m["content"]) for m in messages if m["role"] == "tool"] == [
        ("b", "b"),
        ("a", "a"),
    ]


def test_results_without_ids_are_named_by_themselves_or_after_the_calls_in_order() -> None:
    calls = [{"name": name, "arguments": "{}"} for name in ("a", "b")]
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2", "name": "c"}]
    turns = [USER, {"role": "assistant", "tool_calls": calls}, *results, ASSISTANT]
    messages = to_conversation({"messages": turns})["messages"]
    assert [m["name"] for m in messages if m["role"] == "tool"] == ["a", "c"]


HI, YES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}
ASKED = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
ANSWERED = f"{ASKED}«<|channel|>final<|message|>Yes.<|return|>»"


def function_type(parameters: object) -> str:
    """The line of the developer message that says what a function takes."""
    tools = [{"name": "f", "parameters": parameters}]
    text = rendered({"messages": [HI, YES], "tools": tools})
    return text.partition("{\n\n")[2].partition("\n\n}")[0]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"type": {"description": "The type.", "type": "str"}, "n": {"type": "int"}}, "// The type.\ntype: string,\nn: number,\n"),
        ({"items": {"type": "List[int]"}}, "items: number[],\n"),
        ({"required": {"type": "bool"}, "enum": {"type": "str, optional"}}, "required: boolean,\nenum?: string,\n"),
        ({"properties": {"type": "str", "description": "Of it."}}, "// Of it.\nproperties: string,\n"),
        ({"properties": {"type": {"type": "string"}}, "required": ["type"], "type": "object"}, "type: string,\n"),
        ({"city": {"description": "City"}}, "// City\ncity: any,\n"),
        ({"city": "string", "days": "int, optional"}, "city: string,\ndays?: number,\n"),
        ({"type": "object", "properties": {"city": "string"}}, "city?: string,\n"),
        ({"x": {"type": "Optional[str]"}, "y": {"type": "str | None"}, "z": {"type": "Union[int, None]"}}, "x?: string,\ny?: string,\nz?: number,\n"),
        ({"x": {"type": "str", "required": True}, "y": {"type": "str"}}, "x: string,\ny?: string,\n"),
        ({"x": {"type": "str", "optional": True}, "y": {"type": "str"}}, "x?: string,\ny: string,\n"),
    ],
)  # fmt: skip
def test_parameters_by_their_names_are_an_object_whatever_the_names(
    parameters: object, expected: str
) -> None:
    assert function_type(parameters) == f"type f = (_: {{\n{expected}}}) => any;"


def test_parameters_that_are_no_schema_are_warned_of() -> None:
    tools = [{"name": "f", "parameters": {"city": "Where it is."}}]
    _, findings = read_row({"messages": [HI, YES], "tools": tools})
    assert findings.warnings == [
        "tools[0] has `parameters` with `city`, which is no JSON schema: rendered as `any`"
    ]
    tools = [{"name": "f", "parameters": {"additionalProperties": False}}]
    assert read_row({"messages": [HI, YES], "tools": tools})[1].warnings == []


def test_a_function_that_is_offered_twice_is_rendered_once_or_refused() -> None:
    once, other = {"name": "f", "description": "A."}, {"name": "functions.f", "description": "B."}
    conversation, findings = read_row({"messages": [HI, YES], "tools": [once, once]})
    assert [tool["name"] for tool in conversation["tools"]] == ["f"]
    assert findings.notes == ["a function that stands twice in `tools` offered once"]
    row = {"messages": [HI, YES], "tools": [once, other]}
    assert rendered(row) == "refused: `tools` has two different functions 'f'"


def test_a_function_is_named_as_its_calls_are() -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "functions.f", "arguments": {}}]}
    text = rendered({"messages": [HI, call], "tools": [{"name": "functions.f"}]})
    assert "type f = () => any;" in text and "to=functions.f " in text
