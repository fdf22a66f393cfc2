"""Rows of every known shape, turned into the one shape of conversation that harmony.py renders.

That shape is {"messages": [...], "tools": [...], "reasoning_effort": ...}. A message has `role` and
`content`; an assistant's also `thinking` and `tool_calls`, a tool's also `name`. A message with
`in_loss` false is not trained on. A row of plain text becomes {"text": ...}.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from finetune.data.checks import (
    INSTRUCTION_ROLES,
    Row,
    conversation_problems,
    document_problems,
    function_of,
    list_or_empty,
    text_of,
    thinking_of,
)

SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


class BadRow(ValueError):
    """A row that is not a conversation. Each of its `args` describes one problem."""


def to_conversation(row: Row) -> Row:
    """The conversation in a row of any known shape. Raises BadRow with all of its problems."""
    shape = shape_of(row)
    if shape is None:
        raise BadRow(f"the columns {', '.join(row) or '(none)'} are of no known shape")
    conversation = SHAPES[shape].convert(row)
    if "text" in conversation:
        problems = list(document_problems(conversation["text"]))
    else:
        problems = list(conversation_problems(conversation))
    if problems:
        raise BadRow(*problems)
    return conversation if "text" in conversation else normalize(conversation)


def shape_of(row: Row) -> str | None:
    """The name in SHAPES of the first shape whose columns the row has.

    A column that is null counts as missing: tables give each row the columns of all others.
    """
    columns = {name for name, value in row.items() if value is not None}
    return next((name for name, shape in SHAPES.items() if shape.columns <= columns), None)


# The functions below turn a row of one shape into `messages`, `tools` and `reasoning_effort`. They
# check nothing. They give each message, under `where`, its place in the row for the checks to name.


def from_messages(row: Row) -> Row:
    return with_tools_and_effort(row, with_places(parse_json_column(row["messages"]), "messages"))


def from_sharegpt(row: Row) -> Row:
    turns = parse_json_column(row["conversations"])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return with_tools_and_effort(row, with_places(turns, "conversations"))
    messages = []
    for turn in turns:
        role = turn.get("from", turn.get("role"))
        value = turn.get("value", turn.get("content"))
        message = {**turn, "role": SHAREGPT_ROLES.get(str(role), role), "content": value}
        if role == "function_call":
            calls = parse_json_column(value)
            message["content"] = None
            message["tool_calls"] = calls if isinstance(calls, list) else [calls]
        messages.append(message)
    return with_tools_and_effort(row, with_places(messages, "conversations"))


def from_prompt_completion(row: Row) -> Row:
    """Prompt and completion may each be text or messages. The prompt is never in the loss."""
    prompt, completion = parse_json_column(row["prompt"]), parse_json_column(row["completion"])
    if not isinstance(prompt, list):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(completion, list):
        completion = [{"role": "assistant", "content": completion}]
    prompt = [{**m, "weight": 0} if isinstance(m, dict) else m for m in prompt]
    messages = with_places(prompt, "prompt") + with_places(completion, "completion")
    return with_tools_and_effort(row, messages)


def from_instruction(row: Row) -> Row:
    """Alpaca's columns. The user's message is the instruction, then the input if there is one."""
    question, more = row["instruction"], row.get("input")
    if isinstance(question, str) and isinstance(more, str) and more:
        question = f"{question}\n\n{more}"
    messages = single_exchange(
        row, instructions="system", question=("instruction", question), answer="output"
    )
    return with_tools_and_effort(row, messages)


def from_channels(row: Row) -> Row:
    """The columns of HuggingFaceH4/Multilingual-Thinking, for rows without its `messages`."""
    developer = row.get("developer")
    if row.get("reasoning_language"):
        language = f"reasoning language: {row['reasoning_language']}"
        developer = f"{language}\n\n{developer}" if developer else language
    row = {**row, "developer": developer}
    messages = single_exchange(
        row, instructions="developer", question=("user", row["user"]), answer="final"
    )
    return with_tools_and_effort(row, messages)


def from_text(row: Row) -> Row:
    return {"text": row["text"]}


class Shape(NamedTuple):
    """A known shape of row: the columns it needs, and the function that converts it."""

    columns: set[str]
    convert: Callable[[Row], Row]


# The first match counts, so the richer shapes come first: `messages` may stand beside `text`.
SHAPES = {
    "messages": Shape({"messages"}, from_messages),
    "ShareGPT conversations": Shape({"conversations"}, from_sharegpt),
    "prompt and completion": Shape({"prompt", "completion"}, from_prompt_completion),
    "Alpaca instructions": Shape({"instruction", "output"}, from_instruction),
    "user, analysis and final": Shape({"user", "final"}, from_channels),
    "plain text": Shape({"text"}, from_text),
}


def single_exchange(
    row: Row, *, instructions: str, question: tuple[str, Any], answer: str
) -> list[Any]:
    """The messages of a row that holds one question and one answer in columns of their own.

    instructions, answer: names of columns. question: the name of the column and the text to use.
    """
    column, text = question
    messages = [
        {"role": "user", "content": text, "where": column},
        {
            "role": "assistant",
            "content": row[answer],
            "thinking": row.get("analysis") or thinking_of(row),
            "where": answer,
        },
    ]
    if row.get(instructions):
        developer = {"role": "developer", "content": row[instructions], "where": instructions}
        return [developer, *messages]
    return messages


def with_tools_and_effort(row: Row, messages: list[Any]) -> Row:
    """The messages with the row's `tools` and `reasoning_effort`.

    A `system` column is put before messages that contain no instructions of their own.
    """
    roles = [message.get("role") for message in messages if isinstance(message, dict)]
    has_instructions = any(role in INSTRUCTION_ROLES for role in roles)
    system = row.get("system")
    if isinstance(system, str) and system and not has_instructions:
        messages = [{"role": "system", "content": system, "where": "system"}, *messages]
    effort = row.get("reasoning_effort")
    return {
        "messages": messages,
        "tools": parse_json_column(row.get("tools")),
        "reasoning_effort": effort,
    }


def with_places(messages: Any, field: str) -> list[Any]:
    """The messages, each with its place in the row under `where`, for example "messages[2]".

    A value that is not a list is returned as the only message, for the checks to complain about.
    """
    if not isinstance(messages, list):
        return [messages]
    return [
        {**message, "where": f"{field}[{number}]"} if isinstance(message, dict) else message
        for number, message in enumerate(messages)
    ]


def parse_json_column(value: Any) -> Any:
    """The value that a string of JSON holds. Many datasets keep lists as JSON in a text column.

    Any other value is returned as it is.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def normalize(conversation: Row) -> Row:
    """A conversation without problems in the spelling that harmony.py reads."""
    messages: list[Row] = []
    name_of_id: dict[Any, str] = {}  # the function that each call so far was of
    unanswered: list[str] = []  # the functions of the latest calls, without those answered
    for message in conversation["messages"]:
        turn: Row = {"role": message["role"], "content": text_of(message.get("content")) or ""}
        if message["role"] == "assistant":
            calls = list_or_empty(message.get("tool_calls"))
            turn["thinking"] = thinking_of(message)
            turn["tool_calls"] = [normalize_call(call) for call in calls]
            unanswered = [call["name"] for call in turn["tool_calls"]]
            for call, name in zip(calls, unanswered, strict=True):
                name_of_id[call.get("id")] = name
        elif message["role"] == "tool":
            next_in_order = unanswered.pop(0)
            turn["name"] = answered_function(message, name_of_id, next_in_order)
        if message.get("weight") == 0:
            turn["in_loss"] = False
        messages.append(turn)
    tools = [normalize_tool(tool) for tool in conversation["tools"] or []]
    return {**conversation, "messages": messages, "tools": tools}


def answered_function(message: Row, name_of_id: dict[Any, str], next_in_order: str) -> str:
    """The name of the function whose result a tool message holds.

    The call's id decides; without one the message's own `name`; without that the order of calls.
    """
    call_id = message.get("tool_call_id")
    if call_id and call_id in name_of_id:
        return name_of_id[call_id]
    return (message.get("name") or next_in_order).removeprefix("functions.")


def normalize_call(call: Row) -> Row:
    function = function_of(call)
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    return {"name": function["name"].removeprefix("functions."), "arguments": arguments}


def normalize_tool(tool: Row) -> Row:
    function = function_of(tool)
    return {
        "name": function["name"],
        "description": function.get("description") or "",
        "parameters": function.get("parameters"),
    }
