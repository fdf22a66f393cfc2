"""What keeps a row of a dataset from being a conversation, in words that name the field."""

from collections.abc import Iterator
from typing import Any

EXAMPLE = (
    '{"messages": [{"role": "user", "content": "2+2?"}, '
    '{"role": "assistant", "thinking": "Easy.", "content": "4"}]}'
)
ROLES = ("system", "developer", "user", "assistant", "tool")
INSTRUCTING = ("system", "developer")
EFFORTS = ("low", "medium", "high")
THINKING = ("thinking", "reasoning_content", "reasoning")  # harmony's name, DeepSeek's, vLLM's
Row = dict[str, Any]


def document_problems(text: Any) -> Iterator[str]:
    if not isinstance(text, str):
        yield f"`text` is {kind(text)}, not text"
    elif not text.strip():
        yield "`text` is empty"
    elif text.lstrip().startswith("<|start|>"):
        yield "`text` is rendered already: give the `messages` it was made from"
    else:
        yield from surrogate_problems(text, "`text`")


def conversation_problems(conversation: Row) -> Iterator[str]:
    messages = conversation["messages"]
    if not messages or not all(isinstance(message, dict) for message in messages):
        yield "the messages are no list of objects with `role` and `content`"
        return
    for message in messages:
        yield from message_problems(message)
    if all(message.get("role") in ROLES for message in messages):
        yield from order_problems(messages)
    effort = conversation["reasoning_effort"]
    if effort is not None and effort not in EFFORTS:
        yield f"`reasoning_effort` is {effort!r}, not one of {', '.join(EFFORTS)}"
    tools = conversation["tools"]
    if tools is not None and not isinstance(tools, list):
        yield f"`tools` is {kind(tools)}, not a list of functions"
    for number, tool in enumerate(tools if isinstance(tools, list) else []):
        if not isinstance(function_of(tool).get("name"), str):
            yield f"tools[{number}] has no `name`"


def message_problems(message: Row) -> Iterator[str]:
    where, role, content = message["where"], message.get("role"), message.get("content")
    calls = message.get("tool_calls")
    if role not in ROLES:
        yield f"{where} has the role {role!r}, not one of {', '.join(ROLES)}"
    if content is not None and text_of(content) is None:
        yield f"{where} has {kind(content)} as `content`, not text"
    thinking = thinking_of(message)
    if thinking is not None and not isinstance(thinking, str):
        yield f"{where} has {kind(thinking)} as `thinking`, not text"
    if calls is not None and not isinstance(calls, list):
        yield f"{where} has {kind(calls)} as `tool_calls`, not a list"
    elif calls and role != "assistant":
        yield f"{where} has `tool_calls`, but only the assistant calls tools"
    for number, call in enumerate(calls if isinstance(calls, list) else []):
        if not isinstance(function_of(call).get("name"), str):
            yield f"{where}.tool_calls[{number}] has no function `name`"
        elif not isinstance(function_of(call).get("arguments"), str | dict | None):
            yield f"{where}.tool_calls[{number}] has `arguments` that are neither object nor text"
    if role == "tool" and content is None:
        yield f"{where} has no `content`: what did the tool return?"
    elif role != "tool" and not calls and is_blank(content):
        yield f"{where} has empty `content`"
    for text in (text_of(content), thinking):
        if isinstance(text, str):
            yield from surrogate_problems(text, where)


def surrogate_problems(text: str, where: str) -> Iterator[str]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        yield f"{where} has half a surrogate pair at character {error.start}, which is no Unicode"


def order_problems(messages: list[Row]) -> Iterator[str]:
    """Who speaks after whom: instructions, user and assistant in turns, tools when called."""
    before, num_calls = "start", 0
    for message in messages:
        where, role = message["where"], message["role"]
        calls = message.get("tool_calls")
        if role in INSTRUCTING and before not in ("start", *INSTRUCTING):
            yield f"{where}: a {role} message after the conversation has begun"
        elif role == "assistant" and before in ("start", *INSTRUCTING):
            yield f"{where}: the assistant speaks before a user has"
        elif role in ("user", "assistant") and role == before:
            yield f"{where}: two {role} messages in a row"
        elif role == "tool" and num_calls == 0:
            yield f"{where}: a tool's result, but no call it answers"
        num_calls = max(0, num_calls - 1) if role == "tool" else len(as_calls(calls))
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        yield "no assistant message, so nothing to learn"
    elif before != "assistant":
        yield f"{messages[-1]['where']}: the last message is not the assistant's: leave it out"


def as_calls(calls: Any) -> list[Any]:
    return calls if isinstance(calls, list) else []


def function_of(call: Any) -> Row:
    """Of a tool or a tool call: OpenAI's have it inside `function`, others are it themselves."""
    function = call.get("function", call) if isinstance(call, dict) else None
    return function if isinstance(function, dict) else {}


def thinking_of(message: Row) -> Any:
    return next((message[name] for name in THINKING if message.get(name)), None)


def text_of(content: Any) -> str | None:
    """Of `content`, which may be a list of parts of text; None if it is anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    return None


def kind(value: Any) -> str:
    """As a user would call it."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    if type(value) in (int, float):
        return f"the number {value}"
    return names.get(type(value), f"a {type(value).__name__}")


def is_blank(content: Any) -> bool:
    text = text_of(content)
    return text is not None and not text.strip()
