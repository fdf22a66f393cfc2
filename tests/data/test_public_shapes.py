# ruff: noqa: E501
"""Rows as public datasets and other programs write them: the text and the mask that they become."""

import json
from typing import Any

import pytest

from finetune.data.conversations import read_row, to_conversation
from helpers.rendered import rendered

HI = {"role": "user", "content": "Hi"}
YES = {"role": "assistant", "content": "Yes."}
CALL = {"name": "get_weather", "arguments": {"city": "Oslo"}}
CALLING = {"role": "assistant", "tool_calls": [{"id": "1", "function": CALL}]}
COLD = {"role": "tool", "tool_call_id": "1", "content": "-3"}
WITH_NULL = {"city": "Oslo", "zip": None}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "City"}},
    "required": ["city"],
}
TOOL = {"name": "get_weather", "description": "Weather now.", "parameters": SCHEMA}

ASKED = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
ANSWERED = f"{ASKED}«<|channel|>final<|message|>Yes.<|return|>»"
THOUGHT = f"{ASKED}«<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>»"
CALLED = f'{ASKED}«<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{{"city": "Oslo"}}<|call|>»'
RESULT = "<|start|>functions.get_weather<|channel|>commentary to=assistant<|message|>-3<|end|><|start|>assistant«<|channel|>final<|message|>Yes.<|return|>»"
UNLEARNT = f"{ASKED}<|channel|>final<|message|>Yes.<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant«<|channel|>final<|message|>Yes.<|return|>»"
TWICE = f"{ASKED}«<|channel|>final<|message|>Yes.<|end|>»{ANSWERED}"


def instructed(text: str) -> str:
    return f"<|start|>developer<|message|># Instructions\n\n{text}<|end|>"


def chat(*messages: object, **columns: object) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def saying(text: object, **keys: object) -> dict[str, Any]:
    return chat(HI, {"role": "assistant", "content": text, **keys})


def gemini(response: str, declarations: str, call: str) -> dict[str, Any]:
    schema = {
        "type": "OBJECT",
        "properties": {"city": {"type": "STRING", "description": "City"}},
        "required": ["city"],
    }
    return {
        "contents": [
            {"parts": [{"text": "Hi"}]},
            {"role": "model", "parts": [{call: {"name": "get_weather", "args": {"city": "Oslo"}}}]},
            {"role": "user", "parts": [{response: {"name": "get_weather", "response": -3}}]},
            {"role": "model", "parts": [{"text": "Yes."}]},
        ],
        "tools": [{declarations: [TOOL | {"parameters": schema}]}],
    }


EXPECTED: list[tuple[dict[str, Any], str]] = [
    # What says whether a message is learnt.
    *((chat(HI, YES | {key: value}, HI, YES), UNLEARNT) for key, value in [
        ("loss", False), ("train", 0), ("training", False), ("trainable", "false"), ("loss_mask", 0), ("weight", "0")]),
    (chat(HI, YES, HI, YES, loss_mask=[0, 0, 0, 1]), UNLEARNT),
    (chat(HI, YES, weight=0), ANSWERED.replace("«", "").replace("»", "")),
    (chat(HI, YES, loss=1.37), ANSWERED),
    (saying("Yes.", weight=0.5), "refused: messages[1] has 0.5 as `weight`, not 0 or 1"),
    (saying("Yes.", mask=True), "refused: messages[1] has `mask`: say by `weight`, 0 or 1, whether the message is learnt"),
    (chat(HI, YES, loss_mask=[1]), "refused: `loss_mask` of the row is a list, but not of 2 times 0 or 1: one for each message"),
    *((saying("Yes.", **{key: 0}), f"refused: messages[1] has `{key}`: say by `weight`, 0 or 1, whether the message is learnt") for key in ("loss_scale", "loss_weight", "include_in_loss")),
    ({"prompt": "Hi", "completion": "Yes.", "label": False}, "refused: `label` is false: as in preference data, an answer that is not to be learnt"),
    ({"prompt": "Hi", "completion": "Yes.", "label": True}, ANSWERED),
    (chat(HI | {"attachments": ["a.png"]}, YES), "refused: messages[0] has `attachments`: gpt-oss reads text only"),
    # Shapes.
    ({"system": f"SYSTEM: S -\n{json.dumps(TOOL)}\n", "chat": f"USER: Hi\n\n\nASSISTANT: <functioncall> {json.dumps(CALL)} <|endoftext|>\n\n\nFUNCTION RESPONSE: -3\n\n\nASSISTANT: Yes. <|endoftext|>\n"}, instructed("S\n\n# ToolsTOOLS") + CALLED + RESULT),
    ({"system": "SYSTEM: S", "chat": "USER: Hi\n\nASSISTANT: Yes. <|endoftext|>"}, instructed("S") + ANSWERED),
    ({"chat": [HI, YES]}, ANSWERED),
    ({"chat": "Hi"}, "refused: chat is text that is not JSON, not an object with `role` and `content`"),
    ({"query": "Hi", "answers": json.dumps([CALL]), "tools": json.dumps([TOOL])}, f"TOOLS{CALLED}"),
    ({"instruction": "Hi", "context": "", "response": "Yes.", "category": "qa"}, ANSWERED),
    ({"instruction": "Hi", "context": "Here.", "response": "Yes."}, ANSWERED.replace("Hi", "Hi\n\nHere.")),
    ({"instruction": "Hi", "input": 5, "output": "Yes."}, ANSWERED.replace("Hi", "Hi\n\n5")),
    ({"instruction": "Hi", "input": float("nan"), "output": "Yes."}, ANSWERED),
    ({"instruction": "", "input": "Hi", "output": "Yes."}, ANSWERED),
    ({"instruction": "Hi", "input": {"a": [1]}, "output": "Yes."}, ANSWERED.replace("Hi", 'Hi\n\n{"a": [1]}')),
    ({"id": "x", "system_prompt": "S", "question": "Hi", "response": "Yes."}, instructed("S") + ANSWERED),
    ({"id": "0", "data": ["Hi", "Yes.", "Hi", "Yes."]}, TWICE),
    ({"query": "Hi", "response": "Yes.", "history": [["Hi", "Yes."]], "system": "S"}, instructed("S") + TWICE),
    ({"prompt": "Hi", "response": "Yes."}, ANSWERED),
    ({"prompt": "Hi", "completion": "Yes.", "history": [{"user": "Hi", "assistant": "Yes."}]}, UNLEARNT),
    ({"conversation": [{"system": "S", "input": "Hi", "output": "Yes."}, {"input": "Hi", "output": "Yes."}]}, instructed("S") + TWICE),
    ({"conversations": [{"from": "Human", "value": "Hi"}, {"from": "bing", "value": "Yes."}]}, ANSWERED),
    ({"messages": [{"type": "human", "content": "Hi"}, {"type": "ai", "content": "Yes."}]}, ANSWERED),
    ({"messages": str([HI, YES])}, ANSWERED),
    ({"messages": "Human: Hi"}, "refused: messages is text that is not JSON, not an object with `role` and `content`"),
    ({"data": [chat(HI, YES)]}, "refused: it holds rows under `data`: make each of them a line of a .jsonl file"),
    ({"prompt": {"0": "Hi"}, "completion": {"0": "Yes."}}, "refused: it holds whole columns, as pandas writes them: to_json(orient='records', lines=True)"),
    ({"prompt": "Hi", "completion": None}, "refused: `completion` is null"),
    ({"prompt": "Hi", "chosen": "Yes.", "rejected": "No."}, "refused: it is a pair of answers (`chosen`, `rejected`): make the one to learn `completion`"),
    (chat(HI, YES, history=[["a", "b"]]), "refused: `history` beside `messages`: put it into the messages"),
    (gemini("functionResponse", "functionDeclarations", "functionCall"), f"TOOLS{CALLED}{RESULT}"),
    (gemini("function_response", "function_declarations", "function_call"), f"TOOLS{CALLED}{RESULT}"),
    (chat(
        HI,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "T", "signature": "s"}, {"type": "tool_use", "id": "1", **{"name": "get_weather", "input": {"city": "Oslo"}}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "-3"}]}]},
        YES,
        tools=[{"name": "get_weather", "description": "Weather now.", "input_schema": SCHEMA}],
    ), f"TOOLS{CALLED}{RESULT}".replace("«<|channel|>commentary", "«<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>commentary")),
    (chat(
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "T"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]},
    ), THOUGHT),
    (chat(
        {"author": {"role": "system"}, "content": [{"type": "system_content", "reasoning_effort": "Medium"}]},
        {"role": "developer", "content": [{"type": "developer_content", "instructions": "S", "tools": {"functions": {"name": "functions", "tools": [TOOL]}}}]},
        HI,
        {"role": "assistant", "channel": "analysis", "content": [{"type": "text", "text": "T"}]},
        {"role": "assistant", "channel": "Final", "content": [{"type": "text", "text": "Yes."}]},
    ), instructed("S\n\n# Tools" + "TOOLS") + THOUGHT),
    # Other formats' markup.
    *((saying(text), THOUGHT) for text in [
        "<think>\nT\n</think>\n\nYes.", "T\n</think>\n\nYes.", "T</think>\nYes.", "<thinking>T</thinking>Yes.", "[THINK]T[/THINK]Yes.", "◁think▷T◁/think▷Yes.",
        "<|begin_of_thought|>T<|end_of_thought|>\n\n<|begin_of_solution|>Yes.<|end_of_solution|>", "<think>T</think><answer>Yes.</answer>",
        "<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
        "<|im_start|>assistant\n<think>T</think>Yes.<|im_end|>", "<Think>T</Think>Yes.", "<scratchpad>T</scratchpad>Yes.", "<|think|>T<|/think|>Yes.",
        "<|START_THINKING|>T<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>", "<|channel>thought\nT<channel|>Yes.", "<think>T</think><output>Yes.</output>",
        "<Thought>T</Thought>\n<Output>Yes.</Output>", "<THOUGHT>T</THOUGHT>Yes.", "<Reasoning>T</Reasoning>Yes.", "<REASONING>T</REASONING><CONCLUSION>Yes.</CONCLUSION>",
        "<reasoning_process>T</reasoning_process>Yes.", "<rationale>T</rationale>Yes.", "<cot>T</cot>Yes.", "<scratch_pad>T</scratch_pad>Yes.",
        "<internal_monologue>T</internal_monologue>Yes.", "<begin_of_thought>T<end_of_thought>Yes.", "<think >T</think >Yes.", "&lt;think&gt;T&lt;/think&gt;Yes.",
        "<start_working_out>T<end_working_out><SOLUTION>Yes.</SOLUTION>"]),
    *((saying("Yes.", **{key: "T"}), THOUGHT) for key in ("thoughts", "think", "chain_of_thought", "cot", "rationale", "reasoning_text")),
    *((saying(text), ANSWERED) for text in ["Yes.<|im_end|>", "Yes.</s>", "Yes.<|eot_id|>", "<|assistant|>Yes.", "<think>\n\n</think>\n\nYes.", "Yes.<|return|>", "Yes.<|end|><|endoftext|>", "Yes.<｜end▁of▁sentence｜>", "Yes.\n</s>", "Yes. <|endoftext|>"]),
    *((saying(text), ANSWERED.replace("Yes.", text)) for text in ["<s>old price</s>", 'Was <s class="x">old</s>', "The token that ends a turn is <|im_end|>", "It is: </s>", "<|im_end|>"]),
    *((saying(text), CALLED) for text in [
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        "<tool_call>\n{'name': 'get_weather', 'arguments': {'city': 'Oslo'}}\n</tool_call>",
        '<functioncall> {"name": "get_weather", "arguments": \'{"city": "Oslo"}\'} <|endoftext|>',
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Oslo"}}]',
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}',
        '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]</TOOLCALL>',
        '<TOOL_CALL>{"name": "get_weather", "arguments": {"city": "Oslo"}}</TOOL_CALL>',
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Oslo"}}<|eom_id|>',
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]<|/tool_call|>']),
    (chat(HI, YES | {"content": '[{"name": "f", "arguments": {}}]'}, COLD, YES), 'refused: messages[2]: a tool\'s result that answers no call; messages[1] has `{"name": "f", ...` in its text: write calls as `tool_calls`'),
    (chat(HI, YES, COLD, YES), "refused: messages[2]: a tool's result that answers no call"),
    # Thoughts that bring their tags, and thoughts in two places.
    *((saying("Yes.", **{key: text}), THOUGHT) for key in ("reasoning_content", "thinking", "analysis") for text in [
        "<think>\nT\n</think>", "<think>T", "T\n</think>", "T<|im_end|>", "<Thought>T</Thought>", "<|channel|>analysis<|message|>T<|end|>"]),
    ({"user": "Hi", "analysis": "<think>T</think>", "final": "Yes."}, THOUGHT),
    (saying([{"type": "thinking", "thinking": "<think>T</think>"}, {"type": "text", "text": "Yes."}]), THOUGHT),
    (saying("<think>T</think>Yes.", reasoning_content="<think>\nT\n</think>"), THOUGHT),
    (saying("Yes.", thinking="T", reasoning="<think>T</think>"), THOUGHT),
    (saying([{"type": "thinking", "thinking": "T"}, {"type": "text", "text": "Yes."}], reasoning_content="T"), THOUGHT),
    (saying([{"type": "thinking", "thinking": "A"}, {"type": "text", "text": "Yes."}], reasoning_content="B"), "refused: messages[1] has thinking beside its `content` and inside it"),
    (saying("<think>A</think>Yes.", thinking="B"), "refused: messages[1] has thinking beside its `content` and inside it"),
    (saying("Yes.", additional_kwargs={"reasoning_content": "T"}), THOUGHT),
    (saying("Yes.", info={"think_content": "T", "answer_content": "Yes."}), THOUGHT),
    (saying("<think>T</think>Yes.", info={"think_content": "T!"}), THOUGHT),
    (saying("Yes.", info={"think_content": ["T"]}), "refused: messages[1] has a list as `info.think_content`, not text"),
    (saying([{"type": "text", "text": "A"}, {"type": "thinking", "thinking": "T"}, {"type": "text", "text": "Yes."}]), "refused: messages[1] has thinking or text behind its answer: write its parts in the order thinking, text, calls"),
    # A call in two places.
    (saying(f"<tool_call>{json.dumps(CALL)}</tool_call>", tool_calls=[{"id": "1", "function": CALL}]), CALLED),
    (saying(f"<tool_call>{json.dumps(CALL)}</tool_call>", tool_calls=[{"function": CALL | {"arguments": {}}}]), "refused: messages[1] has calls in its `content` and different ones beside it"),
    (saying(None, function_call=CALL, tool_calls=[{"function": CALL | {"arguments": '{"city": "Oslo"}'}}]), CALLED),
    (saying(None, function_call={"name": "get_weather", "arguments": WITH_NULL}, tool_calls=[CALL]), CALLED),
    (saying(None, function_call=CALL, tool_calls=[{"function": {"name": "f"}}]), "refused: messages[1] has a `function_call` and different `tool_calls`"),
    (chat(HI, {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "get_weather", "input": {"city": "Oslo"}}], "tool_calls": [{"id": "1", "function": CALL}]}, COLD, YES), CALLED + RESULT),
    # ShareGPT's function_call, harmony's preamble and recipient.
    *((chat(HI, {key: "function_call", "value": json.dumps(CALL)} | more), CALLED) for key, more in [("speaker", {}), ("sender", {}), ("from", {"role": None})]),
    (chat(HI, {"from": "function_call", "value": f"<think>T</think>{json.dumps(CALL)}"}), CALLED.replace("«", "«<|channel|>analysis<|message|>T<|end|><|start|>assistant")),
    (chat(HI, {"from": "function_call", "value": "f(city)"}), "refused: messages[1] has a call that is not JSON with a `name` and `arguments`: 'f(city)'"),
    (chat(HI, {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1, "a": 2}}'}), "refused: messages[1] has a call in which the key 'a' appears twice in one object"),
    (chat(HI, YES | {"recipient": "all"}), ANSWERED),
    (chat(HI, YES | {"channel": "commentary"}), "refused: messages[1] has a preamble alone (channel `commentary`): the answer is missing"),
    (saying("<|channel|>commentary<|message|>Yes.<|end|>"), "refused: messages[1] has a preamble alone (channel `commentary`): the answer is missing"),
    (saying("<|im_start|>assistant\n<|im_end|>"), "refused: messages[1] has empty `content`"),
    (saying("T\n</think>"), "refused: messages[1] has thinking alone, and no answer"),
    (saying("<think>T</think>"), "refused: messages[1] has thinking alone, and no answer"),
    (saying("Yes.", reasoning_details=[{"type": "reasoning.text", "text": "T"}]), THOUGHT),
    (saying("Yes.", thinking="T", reasoning="U"), "refused: messages[1] has two different thoughts beside its `content`"),
    # Text that happens to be JSON, and values where text is meant.
    ({"prompt": "Hi", "completion": '[{"role": "user", "content": "Q"}]'}, ANSWERED.replace("Yes.", '[{"role": "user", "content": "Q"}]')),
    ({"prompt": "Hi", "completion": ["a", 1]}, ANSWERED.replace("Yes.", '["a", 1]')),
    ({"instruction": "Hi", "output": False}, "refused: output has true or false as `content`, not text"),
    (chat(HI, CALLING, COLD | {"content": []}, YES, tools=[TOOL]), f"TOOLS{CALLED}{RESULT}".replace("-3", "[]")),
    (chat(HI, {"role": "assistant", "tool_calls": {"id": "1", "function": CALL}}, tools=str([TOOL])), f"TOOLS{CALLED}"),
    # Nulls, and blank text.
    (chat(HI, YES | {"function_call": {"name": None, "arguments": None}, "tool_calls": [None]}, tools="None", system="null"), ANSWERED),
    (chat(HI, CALLING, COLD, YES, tools=[None, {"function": {**TOOL, "parameters": {**SCHEMA, "properties": {**SCHEMA["properties"], "zip": {"type": None}}}}}]), f"TOOLS{CALLED}{RESULT}"),  # type: ignore[dict-item]
    (chat(HI, {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": {"city": "Oslo", "zip": float("nan")}}]}, tools=[TOOL]), f"TOOLS{CALLED}"),
    (chat(HI, {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": {"at": [{"x": 1, "y": None}]}}]}, tools=[TOOL]), f"TOOLS{CALLED}".replace('{"city": "Oslo"}', '{"at": [{"x": 1, "y": null}]}')),
    (chat(HI | {"tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [{"name": "get_weather", "arguments": {"at": [{"x": 1, "y": None}]}}]}, tools=[TOOL]), f"TOOLS{CALLED}".replace('{"city": "Oslo"}', '{"at": [{"x": 1}]}')),
    *((row, CALLED.replace('"}', '", "zip": null}')) for row in [
        chat(HI, {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": WITH_NULL}]}),
        chat(HI, {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": json.dumps(WITH_NULL)}]}),
        saying(f'<tool_call>{json.dumps({"name": "get_weather", "arguments": WITH_NULL})}</tool_call>'),
        chat(HI, {"from": "function_call", "value": json.dumps({"name": "get_weather", "arguments": WITH_NULL})}),
        chat(HI, {"role": "assistant", "function_call": json.dumps({"name": "get_weather", "arguments": WITH_NULL})}),
        {"query": "Hi", "answers": json.dumps([{"name": "get_weather", "arguments": WITH_NULL}])}]),
    ({"query": "Hi", "answers": [{"name": "get_weather", "arguments": WITH_NULL}]}, CALLED),
    (chat(HI, {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": "null"}]}, tools=[TOOL]), f"TOOLS{CALLED}".replace('{"city": "Oslo"}', "{}")),
    # Tools: where they stand, and their schemas.
    (chat(HI, CALLING, tools=[TOOL | {"parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "City", "required": True}}}}]), f"TOOLS{CALLED}"),
    (chat(HI, YES, tools=[TOOL | {"parameters": {"type": "object", "properties": [{"name": "city"}]}}]), "refused: tools[0] has a list as `properties`, not an object by names"),
    (chat({"role": "system", "content": "", "tools": [TOOL]}, HI, CALLING), f"TOOLS{CALLED}"),
    (chat(HI, CALLING, tools={"get_weather": {"description": "Weather now.", "arguments": SCHEMA}}), f"TOOLS{CALLED}"),
    (chat(HI, YES, tools=[TOOL], functions=[{"name": "add"}]), "refused: `tools` and `functions` offer different functions"),
    (chat(HI, YES, tools=[TOOL | {"input_schema": {"type": "object"}}]), "refused: tools[0] has different schemas in parameters and input_schema"),
    (chat(HI, YES, tools=["weather"]), "refused: tools[0] is text, not an object with a `name`"),
    # The effort.
    (chat(HI, YES, reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "high"}), "refused: two different reasoning efforts: high and low"),
    (chat(HI, YES, reasoning_effort="minimal"), "refused: `reasoning_effort` is 'minimal', not one of low, medium, high"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), EXPECTED)
def test_a_row_becomes_what_its_author_means_or_is_refused(
    row: dict[str, Any], expected: str
) -> None:
    text = rendered(row)
    if "TOOLS<|end|>" in expected:  # tools behind instructions
        expected = expected.replace("# ToolsTOOLS", "# Tools")
        text = text.replace(text[text.index("# Tools") + 7 : text.index("<|end|>")], "")
    assert text == expected


@pytest.mark.parametrize(
    ("columns", "effort"),
    [
        ({"reasoning_effort": " High "}, "high"),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, "low"),
        ({"chat_template_kwargs": '{"reasoning_effort": "low"}'}, "low"),
        ({"reasoning": {"effort": "low"}}, "low"),
        ({"reasoning_effort": ""}, None),
    ],
)
def test_the_effort_of_a_row_is_read_wherever_it_stands(
    columns: dict[str, Any], effort: str | None
) -> None:
    assert to_conversation(chat(HI, YES, **columns))["reasoning_effort"] == effort


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("int, optional", {"type": "integer"}),
        ("List[int]", {"type": "array", "items": {"type": "integer"}}),
        ("Dict[str, int], optional", {"type": "object"}),
        ("Optional[str]", {"type": "string"}),
        ("STRING", {"type": "string"}),
        ("Callable", {"type": "Callable"}),
    ],
)
def test_pythons_and_googles_names_of_types_are_json_schemas(
    name: str, schema: dict[str, Any]
) -> None:
    tool = {"name": "f", "parameters": {"x": {"type": name}}}
    read = to_conversation(chat(HI, YES, tools=[tool]))["tools"][0]["parameters"]
    assert read["properties"]["x"] == schema


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (saying("<think x='y'>T</think>Yes."), "messages[1] has `<think>` behind the beginning"),
        (saying("T</think>Yes."), "messages[1] has `</think>` inside its text, without `<think>` before it: left"),
        (saying("```python\nanswer = text.split('</think>')[-1]\n```"), "messages[1] has `</think>` inside its text"),
        (saying("```\nT\n</think>\n```\nends it."), "messages[1] has `</think>` inside its text"),
        (saying("Yes. <Thought>T</Thought>"), "messages[1] has `<Thought>` in its text: left"),
        (saying("<SUMMARY>S</SUMMARY><REASONING>T</REASONING>Yes."), "messages[1] has `<REASONING>` in its text: left"),
        (saying("The token that ends a turn is <|im_end|>"), "messages[1] has `<|im_end|>` in its text: left"),
        (saying("<s>old price</s>"), "messages[1] has `<s>` in its text: left"),
        (saying("Was <s>old</s>"), "messages[1] has `</s>` in its text: left"),
        (saying("Yes.", thinking="T</think>U"), "messages[1] has `</think>` in its thinking: left"),
        (saying("Yes.", thinking="T<|channel|>final<|message|>Yes."), "messages[1] has `<|channel|>` in its thinking: left"),
        (saying('<tool_call>{"name": "f", "arguments": {"a": 1, "a": 2}}</tool_call>'), "messages[1] has `<tool_call>` before an object in which the key 'a' appears twice"),
        (saying("<cot>T"), "messages[1] has `<cot>` and `</cot>` that do not make one pair: left"),
        (saying("<analysis>T</analysis>Yes."), "messages[1] has `<analysis>` in its text"),
        (saying("[get_weather(city='Oslo')]"), "messages[1] has `[get_weather(city='Oslo')]`"),
        (saying("Thought: T\nAction: f\nAction Input: {}"), "messages[1] has `Action Input:`"),
        (saying('<invoke name="f"></invoke>'), "messages[1] has `<invoke name=` in its text"),
        (saying("<｜tool▁calls▁begin｜>f"), "messages[1] has `<｜tool▁calls▁begin｜>`"),
        ({"prompt": "Human: Hi\n\nAssistant:", "completion": "Yes."}, "prompt has `Human:`"),
        (saying("analysisT assistantfinalYes."), "messages[1] has `analysis` in its text"),
        (saying('{"name": "f", "parameters": {}}'), 'messages[1] has `{"name": "f", ...` in its'),
        (saying("<function=f>{}</function>"), "messages[1] has `<function=f` in its text"),
        *((saying(text), 'messages[1] has `{"name": "f", ...` in its text: left') for text in [
            '[{"name": "f", "arguments": {"a": 1}}]', "[{'name': 'f', 'arguments': {}}]", '{"tool_calls": [{"name": "f", "arguments": {}}]}',
            '{"name": "f", "arguments": {}, "id": "1"}', '{"function": "f", "arguments": {}}',
            '{"type": "function", "function": {"name": "f", "arguments": "{}"}}', '```json\n{"name": "f", "arguments": {}}\n```']),
        (saying('[Market Trends API(trend_type="X", country="us")]'), "messages[1] has `[Market Trends API(` in its text"),
        (chat(HI, YES | {"content": "[Get-It(Oslo)]"}, tools=[{"name": "Get-It"}]), "messages[1] has `[Get-It(` in its text"),
        (chat(HI, YES | {"content": "get_weather('Oslo')"}, tools=[TOOL]), "messages[1] has `get_weather(` in its text"),
        (chat(HI, YES | {"content": '{"name": "get_weather", "input": {}}'}, tools=[TOOL]), 'messages[1] has `{"name": "get_weather", ...`'),
        (chat(HI, YES | {"content": 'Now:\n{"name": "get_weather", "arguments": {}}'}, tools=[TOOL]), 'messages[1] has `"name": "get_weather"`'),
        *((saying(text), f"messages[1] has `{tag}` in its text: left") for text, tag in [
            ("```tool_code\nf(x)\n```", "```tool_code"), ("<function-call>{}</function-call>", "<function-call>"), ("<tool>f</tool>", "</tool>"),
            ("<start_function_call>f", "<start_function_call>"), ("<<function>>f(x)", "<<function>>"), (">>>f\n{}", ">>>f\n{"),
            ("✿FUNCTION✿: f", "✿FUNCTION✿"), ("<use_mcp_tool>f", "<use_mcp_tool>"), ("Action_input: {}", "Action_input:")]),
        (saying("<TOOLCALL>f(x)</TOOLCALL>"), "messages[1] has `<TOOLCALL>` before what is not JSON"),
        (chat({"role": "user", "content": "<|im_start|>Hi"}, YES), "messages[0] has `<|im_start|>`"),
        *(({"text": f"{opening} Hi\n{answer} Yes."}, f"`text` begins with another model's `{opening}") for opening, answer in [("<human>:", "<bot>:"), ("User:", "Bot:"), ("### User:", "### Assistant:")]),
        ({"prompt": "Hi\n<extra_id_1>Assistant\nYes.\n<extra_id_1>User\nAnd?", "response": "Yes."}, "prompt has `<extra_id_1>` in its text"),
        ({"text": "Human: Hi"}, "`text` begins with another model's `Human: `"),
        ({"text": "a <|eot_id|> b"}, "`text` has `<|eot_id|>` in it"),
        (chat(HI, {"role": "assistant", "tool_calls": [{"name": "get it", "arguments": {}}]}), "has a space in the name 'get it'"),
    ],
)  # fmt: skip
def test_markup_that_stays_is_warned_of(row: dict[str, Any], words: str) -> None:
    _, findings = read_row(row)
    assert len(findings.warnings) == 1 and words in findings.warnings[0]


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ann", "input": 3}', '[{"name": "Ann", "age": 30}]', '{"function": "sin", "args": [1]}',
        "[see Table 1 (a)]", "f(x)", '{"name": "f", "description": "A tool.", "parameters": {}}', "[1, 2]", "[]",
    ],
)  # fmt: skip
def test_an_answer_that_is_no_call_is_not_warned_of(text: str) -> None:
    assert read_row(saying(text) | {"tools": [TOOL]})[1].warnings == []


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (chat(HI, CALLING), "calls of functions that `tools` does not offer"),
        (chat({"role": "system", "content": "A"}, HI, YES, system="B"), "column `system` not used, since the messages have their own"),
        (chat(HI, YES, train=False), "`train` of the row leaves messages out of the loss"),
        (chat(HI, {"role": "assistant", "tool_calls": [{"name": "f"}]}, HI, YES, tools=[{"name": "f"}]), "calls without a result, although the conversation goes on"),
        (saying("Yes.", info={"think_content": "T"}), "`info.think_content` read as thinking"),
        (saying("Yes.", thinking="<think>T</think>"), "`<think>` around a thought left out"),
        (chat(HI | {"tool_calls": None}, {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": None}}]}, tools=[{"name": "f"}]), "nulls in `arguments` left out, as a table's exporter adds them"),
        (chat(HI, YES | {"function_call": CALL, "tool_calls": [CALL]}, tools=[TOOL]), "calls that stand in two places read once"),
        (chat(HI, YES, HI), "messages behind the last answer cut off (user)"),
    ],
)  # fmt: skip
def test_what_is_read_otherwise_than_it_stands_is_noted(row: dict[str, Any], note: str) -> None:
    _, findings = read_row(row)
    assert findings.notes == [note]


def test_results_whose_calls_repeat_an_id_are_paired_by_name_and_then_by_order() -> None:
    calls = [{"id": "x", "function": {"name": name, "arguments": "{}"}} for name in ("a", "b", "a")]
    results = [
        {"role": "tool", "tool_call_id": "x", "name": "b", "content": "1"},
        {"role": "tool", "tool_call_id": "x", "content": "2"},
        {"role": "tool", "tool_call_id": "x", "content": "3"},
    ]
    turns = to_conversation(chat(HI, {"role": "assistant", "tool_calls": calls}, *results, YES))
    assert [m["name"] for m in turns["messages"] if m["role"] == "tool"] == ["b", "a", "a"]


def test_a_result_of_an_unknown_id_does_not_take_the_call_of_a_later_result() -> None:
    calls = [{"id": key, "function": {"name": key, "arguments": "{}"}} for key in ("a", "b")]
    results = [{"role": "tool", "tool_call_id": key, "content": key} for key in ("?", "a")]
    row = chat(HI, {"role": "assistant", "tool_calls": calls}, *results, YES)
    conversation, findings = read_row(row)
    assert [m["name"] for m in conversation["messages"] if m["role"] == "tool"] == ["b", "a"]
    assert "results whose id no call has, paired by name or order" in findings.notes


def test_several_results_in_one_message_are_as_many_results() -> None:
    calls = '<tool_call>{"name": "a", "arguments": {}}</tool_call><tool_call>{"name": "b", "arguments": {}}</tool_call>'
    results = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    for role in ("tool", "user"):
        row = chat(
            HI, {"role": "assistant", "content": calls}, {"role": role, "content": results}, YES
        )
        found = [m for m in to_conversation(row)["messages"] if m["role"] == "tool"]
        assert [(m["name"], m["content"]) for m in found] == [("a", "1"), ("b", "2")]
