"""Which columns make which shape of row, and the messages that a row of each shape holds.

Each shape becomes a list of Place: the message as it stands in the row, and where that is. Nothing
is checked here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from finetune.data import glaive
from finetune.data.values import (
    Row,
    is_absent,
    is_nothing,
    json_text,
    parse_json,
    rows_of_columns,
    value_of,
)

# The names under which datasets keep the analysis: the chat template's, DeepSeek's and vLLM's.
THINKING_FIELDS = ("thinking", "reasoning_content", "reasoning")
ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_KEYS = ("role", "from", "speaker", "sender")
ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
}
# Two keys of one object that hold a question and its answer.
PAIRS = (
    ("user", "assistant"),
    ("human", "assistant"),
    ("input", "output"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
)


class Place(NamedTuple):
    """A message and its place in the row, for example "messages[2]"."""

    message: Any
    where: str
    in_loss: bool = True


class Shape(NamedTuple):
    """A known shape of row: the columns it needs, others that it reads, and how it is read."""

    columns: set[str]
    others: set[str]
    read: Callable[[Row], list[Place]]


def shape_of(row: Row) -> str | None:
    """The name in SHAPES of the first shape whose columns the row has.

    A column that is null counts as missing: tables give each row the columns of all others.
    """
    columns = {name for name, value in row.items() if value is not None}
    return next((name for name, shape in SHAPES.items() if shape.columns <= columns), None)


def standard_role(role: Any) -> str:
    """A role in OpenAI's words; what it is called otherwise if nobody knows it."""
    name = role.strip().lower() if isinstance(role, str) else ""
    return ROLE_NAMES.get(name, name)


def places(messages: Any, column: str, *, in_loss: bool = True) -> list[Place]:
    """Each message of a column, which may be JSON in a text or a table's object of lists.

    An item may also be an exchange of two messages, and bring a system message along.
    """
    messages = rows_of_columns(parse_json(messages))
    if isinstance(messages, dict) and messages.keys() & {*ROLE_KEYS, "author"}:
        messages = [messages]
    if not isinstance(messages, list):
        return [Place(messages, column, in_loss)]
    found = []
    for number, item in enumerate(messages):
        where = f"{column}[{number}]"
        found += [Place(m, where, in_loss) for m in exchange_of(item) or [item]]
    return found


def exchange_of(item: Any) -> list[Row]:
    """The messages of an object that holds a question and its answer; empty if it is none."""
    if not isinstance(item, dict) or item.keys() & {*ROLE_KEYS, "author", "type"}:
        return []
    pair = next((names for names in PAIRS if item.keys() >= set(names)), None)
    if pair is None:
        return []
    found = [{"role": "user", "content": item[pair[0]]}]
    if not is_absent(item.get("system")):
        found.insert(0, {"role": "system", "content": item["system"]})
    rest = {name: value for name, value in item.items() if name not in (*pair, "system")}
    return [*found, {"role": "assistant", "content": item[pair[1]], **rest}]


def column_of_messages(name: str) -> Callable[[Row], list[Place]]:
    return lambda row: places(row[name], name)


def read_prompt_completion(row: Row) -> list[Place]:
    """Prompt and completion may each be text or messages. The prompt is never in the loss."""
    prompt, completion = row["prompt"], row["completion"]
    if are_messages(prompt):
        asked = places(prompt, "prompt")
    else:
        asked = [Place({"role": "user", "content": prompt}, "prompt")]
    if are_messages(completion, assistant=True):
        answered = places(completion, "completion")
    else:
        answered = [Place(answer_message(completion, row), "completion")]
    asked = history(row.get("history")) + asked
    return [place._replace(in_loss=False) for place in asked] + answered


def are_messages(value: Any, *, assistant: bool = False) -> bool:
    """Whether a value is a list of messages, or one message, also as JSON in a text.

    A prompt or an answer may well be JSON: text stays text unless it is nothing but messages with
    roles, of which with `assistant` one must be the assistant's.
    """
    parsed = rows_of_columns(parse_json(value))
    if isinstance(parsed, dict):
        return isinstance(value, dict) and is_message(parsed)
    if not isinstance(parsed, list) or not parsed or not all(map(is_message, parsed)):
        return False
    roles = {standard_role(value_of(item, *ROLE_KEYS)) for item in parsed}
    return not assistant or "assistant" in roles


def is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    role = standard_role(value_of(value, *ROLE_KEYS))
    return role in ROLES and bool(value.keys() & {"content", "value", "tool_calls"})


def json_of_value(value: Any) -> Any:
    """A value as JSON, where something stands beside the question that is no text."""
    if isinstance(value, str) or is_nothing(value):
        return value
    try:
        return json_text(value)
    except ValueError:
        return value  # read_message says what is wrong with it


def answer_message(answer: Any, row: Row) -> Row:
    """The assistant's message in a column of its own."""
    thinking = {name: row[name] for name in THINKING_FIELDS if not is_absent(row.get(name))}
    if isinstance(row.get("reasoning"), dict) and "effort" in row["reasoning"]:
        del thinking["reasoning"]  # OpenAI's API has the effort there
    return {"role": "assistant", "content": answer, **thinking, "is_column": True}


def single_exchange(
    question: str, answer: str, *, more: str | None = None, instructions: str | None = None
) -> Callable[[Row], list[Place]]:
    """A question and an answer in columns of their own, with the history before them.

    more: the column whose text is put behind the question. instructions: a developer's column.
    """

    def read(row: Row) -> list[Place]:
        asked, rest = row[question], json_of_value(row.get(more)) if more else None
        if is_nothing(rest):
            text = asked
        elif is_absent(asked):
            text = rest
        else:
            text = f"{asked}\n\n{rest}" if isinstance(asked, str) else asked
        developer = developer_text(row, instructions) if instructions else None
        found = [Place({"role": "user", "content": text}, question)]
        answered = answer_message(row[answer], row)
        if not is_absent(row.get("analysis")) and instructions:
            answered["thinking"] = row["analysis"]
        found.append(Place(answered, answer))
        found = history(row.get("history")) + found
        if developer is not None:
            message = {"role": "developer", "content": developer}
            found.insert(0, Place(message, instructions or ""))
        return found

    return read


def developer_text(row: Row, column: str) -> Any:
    developer = value_of(row, column)
    language = value_of(row, "reasoning_language")
    if language is None:
        return developer
    language = f"reasoning language: {language}"
    return f"{language}\n\n{developer}" if developer else language


def history(value: Any) -> list[Place]:
    """Earlier exchanges: pairs of question and answer, or messages."""
    value = parse_json(value)
    if is_nothing(value):
        return []
    if not isinstance(value, list) or all(isinstance(item, dict) for item in value):
        return places(value, "history")
    found = []
    for number, pair in enumerate(value):
        where = f"history[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            found.append(Place(pair, where))
            continue
        found.append(Place({"role": "user", "content": pair[0]}, where))
        found.append(Place({"role": "assistant", "content": pair[1]}, where))
    return found


def read_answers(row: Row) -> list[Place]:
    """xLAM's columns: the answer is the calls that the query needs."""
    calls = {"role": "assistant", "tool_calls": row["answers"]}
    return [Place({"role": "user", "content": row["query"]}, "query"), Place(calls, "answers")]


def read_dialogue(row: Row) -> list[Place]:
    """UltraChat's `data`: the user's and the assistant's texts in turn."""
    texts = parse_json(row["data"])
    if not isinstance(texts, list):
        return [Place(texts, "data")]
    return [
        Place({"role": ("user", "assistant")[n % 2], "content": text}, f"data[{n}]")
        for n, text in enumerate(texts)
    ]


def read_chat(row: Row) -> list[Place]:
    """Glaive's `chat`, a text with the name of who speaks before each message; or messages."""
    chat, system = parse_json(row["chat"]), row.get("system")
    found = []
    if isinstance(system, str) and not is_absent(system):
        found.append(Place(glaive.system_message(system), "system"))
    messages = glaive.messages_of_chat(chat) if isinstance(chat, str) else chat
    return found + places(chat if messages is None else messages, "chat")


# What may stand beside messages of any shape.
TOOL_COLUMNS = ("tools", "functions", "available_tools")
INSTRUCTION_COLUMNS = (
    "system",
    "system_prompt",
    "system_message",
    "systemInstruction",
    "system_instruction",
    "developer",
)
COMMON = {*TOOL_COLUMNS, *INSTRUCTION_COLUMNS, "function_call", "tool_choice"}
COMMON |= {"reasoning_effort", "chat_template_kwargs"}
EXCHANGE = {"history", *THINKING_FIELDS}
# The first match counts, so the richer shapes come first: `messages` may stand beside `text`.
SHAPES = {
    "messages": Shape({"messages"}, set(), column_of_messages("messages")),
    "ShareGPT conversations": Shape({"conversations"}, set(), column_of_messages("conversations")),
    "conversation": Shape({"conversation"}, set(), column_of_messages("conversation")),
    "Gemini contents": Shape({"contents"}, set(), column_of_messages("contents")),
    "prompt and completion": Shape({"prompt", "completion"}, EXCHANGE, read_prompt_completion),
    "Alpaca instructions": Shape(
        {"instruction", "output"},
        {"input"} | EXCHANGE,
        single_exchange("instruction", "output", more="input"),
    ),
    "Dolly instructions": Shape(
        {"instruction", "response"},
        {"context"} | EXCHANGE,
        single_exchange("instruction", "response", more="context"),
    ),
    "user, analysis and final": Shape(
        {"user", "final"},
        {"analysis", "developer", "reasoning_language"} | EXCHANGE,
        single_exchange("user", "final", instructions="developer"),
    ),
    "query, tools and answers": Shape({"query", "answers"}, set(), read_answers),
    "question and response": Shape(
        {"question", "response"}, EXCHANGE, single_exchange("question", "response")
    ),
    "query and response": Shape(
        {"query", "response"}, EXCHANGE, single_exchange("query", "response")
    ),
    "prompt and response": Shape(
        {"prompt", "response"}, EXCHANGE, single_exchange("prompt", "response")
    ),
    "UltraChat data": Shape({"data"}, set(), read_dialogue),
    "Glaive chat": Shape({"chat"}, {"system"}, read_chat),
    "plain text": Shape({"text"}, set(), lambda row: [Place(row["text"], "text")]),
}
