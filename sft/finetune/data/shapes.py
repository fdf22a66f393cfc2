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
# Other names that a message may have for it, where those are taken (assistant.THINKING_KEYS).
SPARE_THOUGHTS = ("analysis", "thought", "thoughts", "think")
# What stands in a column of thinking and is none, in lower case.
FLAGS = {"on", "off", "true", "false", "yes", "no", "0", "1", "enabled", "disabled"}
FLAGS |= {"none", "null", "nan", "n/a", "na", "-"}
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
    asked = history(row.get("history")) + question_places(row["prompt"], "prompt")
    asked = [place._replace(in_loss=False) for place in asked]
    return asked + answer_places(row["completion"], "completion", row)


def question_places(value: Any, column: str) -> list[Place]:
    """What a column asks: text, or messages, which are a prompt and never in the loss."""
    if are_messages(value):
        return places(value, column, in_loss=False)
    return [Place({"role": "user", "content": text_or_parts(value)}, column)]


def answer_places(value: Any, column: str, row: Row) -> list[Place]:
    """What a column answers: text, a message, messages, or the object of an API."""
    value = message_of_api(value)
    if not are_messages(value, is_answer=True):
        return [Place(answer_message(value, row), column)]
    found = places(value, column)
    answers = [n for n, place in enumerate(found) if is_assistant(place.message)]
    if len(answers) == 1:
        place = found[answers[0]]
        message = {**place.message}
        for thought in row_thoughts(row).values():
            key = next(key for key in (*THINKING_FIELDS, *SPARE_THOUGHTS) if key not in message)
            message[key] = thought
        found[answers[0]] = place._replace(message=message)
    return found


def message_of_api(value: Any) -> Any:
    """The message in a value that OpenAI's API answers with; any other value as it is."""
    if not isinstance(value, dict):
        return value
    choices = value.get("choices")
    if isinstance(choices, list) and len(choices) == 1 and isinstance(choices[0], dict):
        answer = choices[0].get("message", choices[0].get("text"))
        return value if answer is None else answer
    if isinstance(value.get("message"), dict) and is_message(value["message"]):
        return value["message"]
    keys = {key for key, item in value.items() if item is not None}
    if "content" in keys and keys <= {"content", "tool_calls", "refusal", *THINKING_FIELDS}:
        return {**value, "role": "assistant"}
    return value


def are_messages(value: Any, *, is_answer: bool = False) -> bool:
    """Whether a column that may be text holds a message or messages instead.

    An object with a role and content is never meant as JSON. A text may well be: it holds messages
    only if it is a list of nothing else that can stand where it does. A prompt ends with who is
    answered, and nobody but the assistant and its tools speaks in an answer.
    """
    items = rows_of_columns(parse_json(value))
    if not isinstance(value, str):
        items = items if isinstance(items, list) else [items]
        return any(map(is_message, items))
    if not is_chat_in_text(value) or not isinstance(items, list):
        return False
    roles = [standard_role(value_of(item, *ROLE_KEYS)) for item in items]
    if is_answer:
        return "assistant" in roles and set(roles) <= {"assistant", "tool"}
    return roles[-1] in ("user", "tool")


def is_chat_in_text(value: Any) -> bool:
    """Whether a text is JSON of messages and of nothing else, be they meant or quoted."""
    if not isinstance(value, str):
        return False
    items = rows_of_columns(parse_json(value))
    items = [items] if isinstance(items, dict) else items
    return isinstance(items, list) and bool(items) and all(map(is_message, items))


def is_assistant(message: Any) -> bool:
    return isinstance(message, dict) and standard_role(value_of(message, *ROLE_KEYS)) == "assistant"


def is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    role = standard_role(value_of(value, *ROLE_KEYS))
    return role in ROLES and bool(value.keys() & {"content", "value", "tool_calls"})


def json_of_value(value: Any) -> Any:
    """A value as JSON, where something stands beside the question that is no text.

    Of texts only what pandas writes for nothing is nothing: `[]` may be what the question is about.
    """
    if isinstance(value, str):
        return None if value in ("nan", "NaN") else value
    if is_nothing(value):
        return None
    try:
        return json_text(value)
    except ValueError:
        return value  # read_message says what is wrong with it


def text_or_parts(value: Any) -> Any:
    """A question as text: a number, an object and a list are written as JSON.

    Typed parts stay, and so does what has a role that nobody knows, which read_message refuses.
    """
    items = value if isinstance(value, list) else [value]
    is_typed = any(isinstance(item, dict) and item.keys() & {"type", *ROLE_KEYS} for item in items)
    if is_typed or isinstance(value, bool) or is_nothing(value):
        return value
    return json_of_value(value)


def row_thoughts(row: Row) -> Row:
    """The columns that hold the thinking. A flag such as `on` says only that there may be some."""
    thoughts = {
        name: row[name]
        for name in THINKING_FIELDS
        if not is_absent(row.get(name)) and not is_flag(row[name])
    }
    if isinstance(row.get("reasoning"), dict) and "effort" in row["reasoning"]:
        del thoughts["reasoning"]  # OpenAI's API has the effort there
    if "final" in row and not is_absent(row.get("analysis")) and not is_flag(row["analysis"]):
        thoughts["analysis"] = row["analysis"]
    return thoughts


def is_flag(value: Any) -> bool:
    """Whether a value switches thinking on or off, or says that there is none."""
    if isinstance(value, bool):
        return True
    return isinstance(value, str) and value.strip().strip(".").lower() in FLAGS


def answer_message(answer: Any, row: Row) -> Row:
    """The assistant's message in a column of its own."""
    return {"role": "assistant", "content": answer, **row_thoughts(row), "is_column": True}


def single_exchange(
    question: str, answer: str, *, more: str | None = None, instructions: str | None = None
) -> Callable[[Row], list[Place]]:
    """A question and an answer in columns of their own, with the history before them.

    more: the column whose text is put behind the question. instructions: a developer's column.
    """

    def read(row: Row) -> list[Place]:
        found = history(row.get("history"))
        found += question_places(with_more(row, question, more), question)
        found += answer_places(row[answer], answer, row)
        developer = developer_text(row, instructions) if instructions else None
        if developer is not None:
            message = {"role": "developer", "content": developer}
            found.insert(0, Place(message, instructions or ""))
        return found

    return read


def with_more(row: Row, question: str, more: str | None) -> Any:
    """The question with the text of another column behind it, if there is one."""
    asked, rest = row[question], json_of_value(row.get(more)) if more else None
    if is_absent(rest) or (not isinstance(asked, str) and are_messages(asked)):
        return asked  # messages beside such a column are refused by check_texts
    if is_absent(asked):
        return rest
    asked = text_or_parts(asked)
    if isinstance(asked, list):
        return [*asked, {"type": "text", "text": f"\n\n{rest}"}]
    return f"{asked}\n\n{rest}" if isinstance(asked, str) else asked


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


def is_glaive(row: Row) -> bool:
    """Whether `chat` is Glaive's text; then `system` is a text that ends in functions."""
    chat = row.get("chat")
    return isinstance(chat, str) and glaive.messages_of_chat(chat) is not None


def read_chat(row: Row) -> list[Place]:
    """Glaive's `chat`, a text with the name of who speaks before each message; or messages."""
    if not is_glaive(row):
        return places(row["chat"], "chat")
    system, found = row.get("system"), []
    if isinstance(system, str) and not is_absent(system):
        found.append(Place(glaive.system_message(system), "system"))
    return found + places(glaive.messages_of_chat(row["chat"]), "chat")


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
ANSWER_COLUMNS = ("response", "completion", "answer", "output")
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
    "Glaive chat": Shape({"chat"}, set(), read_chat),
    "plain text": Shape({"text"}, set(), lambda row: [Place(row["text"], "text")]),
}
