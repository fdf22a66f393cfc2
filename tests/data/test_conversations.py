# ruff: noqa: E501
"""Rows of every known shape become the same conversation."""

import json
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


THOUGHT = f"{ASKED}«<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>»"
UNLEARNT = f"{ASKED}<|channel|>final<|message|>Yes.<|end|>{ANSWERED}"
TWICE = f"{ASKED}«<|channel|>final<|message|>Yes.<|end|>»{ANSWERED}"
PAIR = "refused: it is a pair of answers (`chosen`, `rejected`): make the one to learn `completion`"
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}
PAIR_BESIDE = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}


def instructed(text: str) -> str:
    return f"<|start|>developer<|message|># Instructions\n\n{text}<|end|>"


def refused(key: str, value: object) -> str:
    return f"refused: `{key}` is {value}: as in preference data, an answer that is not to be learnt"


def answered(text: str) -> str:
    return ANSWERED.replace("Yes.", text)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # Answers that somebody has found bad.
        *(({"prompt": "Hi", "completion": "Yes.", "label": value}, refused("label", value)) for value in (0, "False", "0", 0.0, "FALSE", "rejected")),
        *(({"prompt": "Hi", "completion": "Yes.", "label": value}, ANSWERED) for value in (1, "True", 1.0, 2, 5, "positive", None, float("nan"))),
        ({"messages": [HI, YES], "kto_tag": False}, refused("kto_tag", "false")),
        ({"messages": [HI, YES], "desirable": 0}, refused("desirable", 0)),
        ({"messages": [HI, YES], "kto_tag": True}, ANSWERED),
        ({"messages": [HI, YES], "kto_tag": "maybe"}, "refused: `kto_tag` is 'maybe', neither true nor false: is the answer to be learnt?"),
        # Answers beside messages that end with a question.
        ({"conversations": [HUMAN, GPT, HUMAN], **PAIR_BESIDE}, PAIR),
        ({"messages": [HI], "chosen": "a", "rejected": "b"}, PAIR),
        ({"messages": [HI, YES], "chosen": [HI, YES], "rejected": [HI]}, ANSWERED),
        ({"messages": [HI, YES, HI], "response": "Yes."}, TWICE),
        ({"messages": [HI, YES, HI], "completion": [YES]}, TWICE),
        ({"messages": [HI], "answer": "Yes.", "thinking": "T"}, THOUGHT),
        ({"messages": [HI], "answer": "Yes.", "response": "No."}, "refused: `response` and `answer` beside messages without an answer: keep the one to learn"),
        # Answers and questions that are messages.
        *(({question: "Hi", "response": answer}, ANSWERED) for question in ("prompt", "question", "query", "instruction") for answer in (YES, [YES])),
        ({"prompt": "Hi", "completion": {"choices": [{"message": YES}]}}, ANSWERED),
        ({"prompt": "Hi", "completion": {"choices": [{"text": "Yes."}]}}, ANSWERED),
        ({"prompt": "Hi", "completion": {"content": "Yes."}}, ANSWERED),
        ({"prompt": "Hi", "completion": {"content": "Yes.", "title": "A"}}, answered('{"content": "Yes.", "title": "A"}')),
        ({"prompt": "Hi", "completion": {"choices": [1]}}, answered('{"choices": [1]}')),
        ({"prompt": "Hi", "completion": {"choices": [{"message": YES}, {"message": YES}]}}, "refused: completion holds 2 choices: keep the one to learn"),
        ({"prompt": json.dumps([HI]), "response": "Yes."}, ANSWERED),
        ({"prompt": [HI, YES, HI], "response": "Yes."}, UNLEARNT),
        ({"prompt": json.dumps([HI, YES]), "response": "Yes."}, ANSWERED.replace("Hi", json.dumps([HI, YES]))),
        ({"instruction": [HI], "input": "x", "output": "Yes."}, "refused: `input` beside messages in `instruction`: put it into them"),
        ({"prompt": "Hi", "completion": json.dumps([HI, YES])}, answered(json.dumps([HI, YES]))),
        ({"prompt": "Hi", "completion": json.dumps([YES])}, ANSWERED),
        ({"prompt": 5, "response": "Yes."}, ANSWERED.replace("Hi", "5")),
        ({"prompt": {"a": [1]}, "completion": "Yes."}, ANSWERED.replace("Hi", '{"a": [1]}')),
        ({"prompt": [{"type": "text", "text": "Hi"}], "completion": "Yes."}, ANSWERED),
        ({"prompt": [{"role": "narrator", "content": "Hi"}], "completion": "Yes."}, "refused: prompt has a part with `role` as `content`, not text"),
        ({"prompt": True, "completion": "Yes."}, "refused: prompt has true or false as `content`, not text"),
        # Thinking in a column.
        ({"prompt": "Hi", "completion": [YES], "thinking": "T"}, THOUGHT),
        ({"prompt": "Hi", "completion": [YES | {"thinking": "T"}], "thinking": "T"}, THOUGHT),
        ({"prompt": "Hi", "completion": [YES | {"thinking": "U"}], "thinking": "T"}, "refused: completion[0] has two different thoughts beside its `content`"),
        ({"prompt": "Hi", "completion": [YES, HI, YES], "thinking": "T"}, "refused: `thinking` beside 2 messages of the assistant in `completion`: put it into the one that it belongs to"),
        ({"user": "Hi", "analysis": "T", "thinking": "B", "final": "Yes."}, "refused: final has two different thoughts beside its `content`"),
        ({"user": "Hi", "analysis": "T", "thinking": "T", "final": "Yes."}, THOUGHT),
        *(({"prompt": "Hi", "response": "Yes.", "reasoning": flag}, ANSWERED) for flag in ("on", "off", "N/A", True)),
        # Text that is nothing elsewhere.
        *(({"instruction": "Hi", "input": text, "output": "Yes."}, ANSWERED.replace("Hi", f"Hi\n\n{text}")) for text in ("[]", "{}", "null", "None")),
        ({"instruction": "Hi", "context": "nan", "response": "Yes."}, ANSWERED),
        ({"instruction": "Hi", "context": [], "response": "Yes."}, ANSWERED),
        ({"instruction": "Hi", "context": {}, "response": "Yes."}, ANSWERED),
        # Instructions.
        ({"messages": [HI, YES], "system": "S", "developer": "D"}, "refused: `system` and `developer` hold different instructions: keep one of them"),
        ({"messages": [HI, YES], "system": "S", "developer": "S"}, instructed("S") + ANSWERED),
        ({"user": "Hi", "final": "Yes.", "developer": "D", "system": "S"}, "refused: `system` and `developer` hold different instructions: keep one of them"),
        ({"chat": [HI, YES], "system": {"content": "S"}}, instructed("S") + ANSWERED),
        ({"chat": [HI, YES], "system": 'Answer so:\n{"a": 1}'}, instructed('Answer so:\n{"a": 1}') + ANSWERED),
        ({"chat": "USER: Hi\n\nASSISTANT: Yes.", "system": 'Answer so:\n{"a": 1}'}, instructed('Answer so:\n{"a": 1}') + ANSWERED),
        ({"messages": [HI, YES], "chat_template_kwargs": {"custom_instructions": "S", "xml_tools": [], "python_tools": []}}, instructed("S") + ANSWERED),
        ({"messages": [HI, YES], "chat_template_kwargs": {"xml_tools": ['{"name": "f"}']}}, "<|start|>developer<|message|># Tools\n\n## functions\n\nnamespace functions {\n\ntype f = () => any;\n\n} // namespace functions<|end|>" + ANSWERED),
        ({"messages": [HI, YES], "chat_template_kwargs": {"python_tools": ["def f(): ..."]}}, "refused: `chat_template_kwargs.python_tools` are called by Python code, which is no call of gpt-oss: write them and their calls as `tools` and `tool_calls`"),
        # What the columns hold is no conversation.
        ({"messages": {"0": HI, "1": YES}}, "refused: `messages` holds messages by their numbers: make it a list of them"),
        ({"query": "Hi", "answers": "[]"}, "refused: `answers` holds no calls, as xLAM's does: a text to learn is called `response`"),
        ({"query": "Hi", "answers": ["Paris"]}, "refused: `answers` holds no calls, as xLAM's does: a text to learn is called `response`"),
        ({"messages": '[{"role": "user", "content": "Hi", "content": "Ho"}]'}, "refused: `messages`: the key 'content' appears twice in one object"),
        ({"messages": [HI, YES], "tools": '[{"name": "f", "name": "g"}]'}, "refused: `tools`: the key 'name' appears twice in one object"),
        ({"prompt": "Hi", "response": '{"a": 1, "a": 2}'}, answered('{"a": 1, "a": 2}')),
        ({"messages": [{"role": "user", "content": "", "value": "Hi"}, YES]}, ANSWERED),
    ],
)  # fmt: skip
def test_columns_become_what_their_author_means_or_are_refused(
    row: dict[str, Any], expected: str
) -> None:
    assert rendered(row) == expected


@pytest.mark.parametrize(
    ("row", "notes", "warnings"),
    [
        ({"messages": [HI, YES, HI], "response": "Yes."}, ["`response` read as the answer to the messages beside it"], []),
        ({"prompt": json.dumps([HI]), "response": "Yes."}, ["JSON of messages in the text of `prompt` read as messages"], []),
        ({"prompt": json.dumps([HI, YES]), "response": "Yes."}, [], ["prompt has messages as JSON in its text: left as it stands"]),
        ({"prompt": "Hi", "completion": json.dumps([HI, YES])}, [], ["completion has messages as JSON in its text: left as it stands"]),
        ({"prompt": "Hi", "response": "Yes.", "reasoning": "on"}, ["`reasoning` is 'on', a flag and no thought: not learnt"], []),
    ],
)  # fmt: skip
def test_how_columns_were_read_is_told(
    row: dict[str, Any], notes: list[str], warnings: list[str]
) -> None:
    _, findings = read_row(row)
    assert (findings.notes, findings.warnings) == (notes, warnings)
    assert findings.unread == set()


def test_a_class_beside_a_document_does_not_refuse_it() -> None:
    assert to_conversation({"text": "Dull.", "label": 0}) == {"text": "Dull."}
    with pytest.raises(BadRow, match="`label` is false"):
        to_conversation({"text": "Dull.", "label": False})
