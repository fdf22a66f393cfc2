"""Checks of a conversation. Each problem is described in words that name the field it is in."""

from collections.abc import Iterator
from typing import Any

EXAMPLE = (
    '{"messages": [{"role": "user", "content": "2+2?"}, '
    '{"role": "assistant", "thinking": "Easy.", "content": "4"}]}'
)
ROLES = ("system", "developer", "user", "assistant", "tool")
INSTRUCTION_ROLES = ("system", "developer")
EFFORTS = ("low", "medium", "high")
# The names under which datasets keep the analysis: the chat template's, DeepSeek's and vLLM's.
THINKING_FIELDS = ("thinking", "reasoning_content", "reasoning")

Row = dict[str, Any]


def document_problems(text: Any) -> Iterator[str]:
    """Describe what is wrong with the text of a row of plain text."""
    if not isinstance(text, str):
        yield f"`text` is {type_in_words(text)}, not text"
    elif not text.strip():
        yield "`text` is empty"
    elif text.lstrip().startswith("<|start|>"):
        # Its control tokens would be encoded as text, and the model would learn to spell them out.
        yield "`text` is rendered already: give the `messages` it was made from"
    else:
        yield from surrogate_problems(text, "`text`")


def conversation_problems(conversation: Row) -> Iterator[str]:
    """Describe what is wrong with a conversation.

    conversation: `messages`, `tools` and `reasoning_effort`. Each message that is an object has
    its place in the row under `where`, for example "messages[2]".
    """
    messages = conversation["messages"]
    if not messages or not all(isinstance(message, dict) for message in messages):
        yield "the messages are not a list of objects with `role` and `content`"
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
        yield f"`tools` is {type_in_words(tools)}, not a list of functions"
    for number, tool in enumerate(list_or_empty(tools)):
        if not isinstance(function_of(tool).get("name"), str):
            yield f"tools[{number}] has no `name`"


def message_problems(message: Row) -> Iterator[str]:
    """Describe what is wrong with a single message."""
    where, role, content = message["where"], message.get("role"), message.get("content")
    calls = message.get("tool_calls")
    if role not in ROLES:
        yield f"{where} has the role {role!r}, not one of {', '.join(ROLES)}"
    if content is not None and text_of(content) is None:
        yield f"{where} has {type_in_words(content)} as `content`, not text"
    thinking = thinking_of(message)
    if thinking is not None and not isinstance(thinking, str):
        yield f"{where} has {type_in_words(thinking)} as `thinking`, not text"
    yield from tool_call_problems(message)
    if role == "tool" and content is None:
        yield f"{where} has no `content`: what did the tool return?"
    elif role != "tool" and not calls and is_blank(content):
        yield f"{where} has empty `content`"
    for text in (text_of(content), thinking):
        if isinstance(text, str):
            yield from surrogate_problems(text, where)


def tool_call_problems(message: Row) -> Iterator[str]:
    """Describe what is wrong with the tool calls of a message."""
    where, calls = message["where"], message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        yield f"{where} has {type_in_words(calls)} as `tool_calls`, not a list"
    elif calls and message.get("role") != "assistant":
        yield f"{where} has `tool_calls`, but only the assistant calls tools"
    for number, call in enumerate(list_or_empty(calls)):
        if not isinstance(function_of(call).get("name"), str):
            yield f"{where}.tool_calls[{number}] has no function `name`"
        elif not isinstance(function_of(call).get("arguments"), str | dict | None):
            yield f"{where}.tool_calls[{number}] has `arguments` that are neither object nor text"


def surrogate_problems(text: str, where: str) -> Iterator[str]:
    """JSON can spell half a surrogate pair (`\\ud800`), which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        yield f"{where} has half a surrogate pair at character {error.start}: not valid Unicode"


def order_problems(messages: list[Row]) -> Iterator[str]:
    """Check who speaks after whom.

    Instructions come first, user and assistant take turns, and each tool result answers a call.
    """
    before, num_unanswered_calls = "start", 0
    for message in messages:
        where, role = message["where"], message["role"]
        if role in INSTRUCTION_ROLES and before not in ("start", *INSTRUCTION_ROLES):
            yield f"{where}: a {role} message after the conversation has begun"
        elif role == "assistant" and before in ("start", *INSTRUCTION_ROLES):
            yield f"{where}: the assistant speaks before a user has"
        elif role in ("user", "assistant") and role == before:
            yield f"{where}: two {role} messages in a row"
        elif role == "tool" and num_unanswered_calls == 0:
            yield f"{where}: a tool's result that answers no call"
        if role == "tool":
            num_unanswered_calls = max(0, num_unanswered_calls - 1)
        else:
            num_unanswered_calls = len(list_or_empty(message.get("tool_calls")))
        before = role
    if not any(message["role"] == "assistant" for message in messages):
        yield "there is no assistant message, so there is nothing to train on"
    elif before != "assistant":
        yield f"{messages[-1]['where']}: the last message is not the assistant's: leave it out"


def list_or_empty(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def function_of(call: Any) -> Row:
    """The function of a tool or of a tool call; empty if there is none.

    OpenAI's objects keep it under `function`. In other datasets the object itself is the function.
    """
    function = call.get("function", call) if isinstance(call, dict) else None
    return function if isinstance(function, dict) else {}


def thinking_of(message: Row) -> Any:
    """The first value under one of THINKING_FIELDS that is not empty; None if there is none."""
    return next((message[name] for name in THINKING_FIELDS if message.get(name)), None)


def text_of(content: Any) -> str | None:
    """The text of `content`, which may be a list of text parts. None if it is anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    return None


def type_in_words(value: Any) -> str:
    """The type of a JSON value as the writer of the JSON would call it, for example "a list"."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    if type(value) in (int, float):
        return f"the number {value}"
    return names.get(type(value), f"a {type(value).__name__}")


def is_blank(content: Any) -> bool:
    text = text_of(content)
    return text is not None and not text.strip()
