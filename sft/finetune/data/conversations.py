"""The shapes conversations come in, turned into the one that harmony.py renders:

{"messages": [...], "tools": [...], "reasoning_effort": ...}, the messages with `role`, `content`,
`thinking`, `tool_calls` and, for a tool's, `name`; or {"text": ...}.
"""

import json
from collections.abc import Callable
from typing import Any

from finetune.data.checks import (
    INSTRUCTING,
    THINKING,
    Row,
    as_calls,
    conversation_problems,
    document_problems,
    function_of,
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
    """A row that is no conversation; each argument is one problem."""


def to_conversation(row: Row) -> Row:
    """The conversation in a row of any known shape. Raises BadRow with every problem it has."""
    shape = shape_of(row)
    if shape is None:
        raise BadRow(f"the columns {', '.join(row) or '(none)'} are of no known shape")
    conversation = SHAPES[shape][1](row)
    if "text" in conversation:
        problems = list(document_problems(conversation["text"]))
    else:
        problems = list(conversation_problems(conversation))
    if problems:
        raise BadRow(*problems)
    return conversation if "text" in conversation else canonical(conversation)


def shape_of(row: Row) -> str | None:
    """Its name in SHAPES, by its columns; a column that is null counts as absent."""
    columns = {name for name, value in row.items() if value is not None}
    return next((name for name, (needed, _) in SHAPES.items() if needed <= columns), None)


def from_messages(row: Row) -> Row:
    return with_extras(row, named(parsed(row["messages"]), "messages"))


def from_sharegpt(row: Row) -> Row:
    turns = parsed(row["conversations"])
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return with_extras(row, named(turns, "conversations"))
    messages = []
    for turn in turns:
        role = turn.get("from", turn.get("role"))
        value = turn.get("value", turn.get("content"))
        message = {**turn, "role": SHAREGPT_ROLES.get(str(role), role), "content": value}
        if role == "function_call":
            message |= {"content": None, "tool_calls": as_list(parsed(value))}
        messages.append(message)
    return with_extras(row, named(messages, "conversations"))


def from_prompt_completion(row: Row) -> Row:
    """Either may be text or messages; nothing of the prompt is learnt."""
    prompt, completion = parsed(row["prompt"]), parsed(row["completion"])
    if not isinstance(prompt, list):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(completion, list):
        completion = [{"role": "assistant", "content": completion}]
    unlearnt = [m | {"weight": 0} if isinstance(m, dict) else m for m in prompt]
    messages = named(unlearnt, "prompt") + named(completion, "completion")
    return with_extras(row, messages)


def from_instruction(row: Row) -> Row:
    """Alpaca's columns; input, where there is one, follows the instruction."""
    question, more = row["instruction"], row.get("input")
    if isinstance(question, str) and isinstance(more, str) and more:
        question = f"{question}\n\n{more}"
    return with_extras(row, turns_of(row, "system", ("instruction", question), "output"))


def from_channels(row: Row) -> Row:
    """Multilingual-Thinking's columns, without its own `messages`."""
    developer = row.get("developer")
    if row.get("reasoning_language"):
        language = f"reasoning language: {row['reasoning_language']}"
        developer = f"{language}\n\n{developer}" if developer else language
    row = {**row, "developer": developer}
    return with_extras(row, turns_of(row, "developer", ("user", row["user"]), "final"))


def from_text(row: Row) -> Row:
    return {"text": row["text"]}


SHAPES: dict[str, tuple[set[str], Callable[[Row], Row]]] = {
    "messages": ({"messages"}, from_messages),
    "ShareGPT conversations": ({"conversations"}, from_sharegpt),
    "prompt and completion": ({"prompt", "completion"}, from_prompt_completion),
    "Alpaca instructions": ({"instruction", "output"}, from_instruction),
    "user, analysis and final": ({"user", "final"}, from_channels),
    "plain text": ({"text"}, from_text),
}


def turns_of(row: Row, instructing: str, question: tuple[str, Any], answer: str) -> list[Any]:
    """Of a row with one question and one answer, and maybe a column that instructs."""
    field, text = question
    messages = [{"role": "user", "content": text, "where": field}]
    thinking = row.get("analysis") or next(filter(None, map(row.get, THINKING)), None)
    content = row[answer]
    reply = {"role": "assistant", "content": content, "thinking": thinking, "where": answer}
    if row.get(instructing):
        messages.insert(0, {"role": "developer", "content": row[instructing], "where": instructing})
    return [*messages, reply]


def with_extras(row: Row, messages: Any) -> Row:
    """The messages with what else a row may say; a system prompt beside ShareGPT's turns too."""
    roles = [m.get("role") for m in messages if isinstance(m, dict)]
    if isinstance(row.get("system"), str) and row["system"] and not set(INSTRUCTING) & set(roles):
        messages = [{"role": "system", "content": row["system"], "where": "system"}, *messages]
    effort = row.get("reasoning_effort")
    return {"messages": messages, "tools": parsed(row.get("tools")), "reasoning_effort": effort}


def named(messages: Any, field: str) -> list[Any]:
    """Each with where it stands in the row; what is no list as the only one."""
    if not isinstance(messages, list):
        return [messages]
    return [
        m | {"where": f"{field}[{n}]"} if isinstance(m, dict) else m for n, m in enumerate(messages)
    ]


def parsed(value: Any) -> Any:
    """Columns of lists are often JSON inside a string."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def canonical(conversation: Row) -> Row:
    """What harmony.py reads, of a conversation without problems."""
    messages: list[Row] = []
    names: dict[Any, str] = {}
    waiting: list[str] = []
    for message in conversation["messages"]:
        turn: Row = {"role": message["role"], "content": text_of(message.get("content")) or ""}
        if message["role"] == "assistant":
            turn["thinking"] = thinking_of(message)
            turn["tool_calls"] = [call_of(call) for call in as_calls(message.get("tool_calls"))]
            waiting = [call["name"] for call in turn["tool_calls"]]
            ids = [call.get("id") for call in as_calls(message.get("tool_calls"))]
            names |= dict(zip(ids, waiting, strict=True))
        elif message["role"] == "tool":
            called = waiting.pop(0)
            name = names.get(message.get("tool_call_id") or ..., message.get("name") or called)
            turn["name"] = name.removeprefix("functions.")
        if message.get("weight") == 0:
            turn["in_loss"] = False
        messages.append(turn)
    tools = [tool_of(tool) for tool in conversation["tools"] or []]
    return {**conversation, "messages": messages, "tools": tools}


def call_of(call: Row) -> Row:
    function = function_of(call)
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    return {"name": function["name"].removeprefix("functions."), "arguments": arguments}


def tool_of(tool: Row) -> Row:
    function = function_of(tool)
    description = function.get("description") or ""
    return {
        "name": function["name"],
        "description": description,
        "parameters": function.get("parameters"),
    }
