"""Which columns make which shape of row, and the messages that a row of each shape holds.

Each shape becomes a list of Place: the message as it stands in the row, and where that is. Nothing
is checked here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from finetune.data.values import Row, is_absent, parse_json, rows_of_columns, value_of

# The names under which datasets keep the analysis: the chat template's, DeepSeek's and vLLM's.
THINKING_FIELDS = ("thinking", "reasoning_content", "reasoning")
ROLES = ("system", "developer", "user", "assistant", "tool")


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


def places(messages: Any, column: str, *, in_loss: bool = True) -> list[Place]:
    """Each message of a column, which may be JSON in a text or a table's object of lists."""
    messages = rows_of_columns(parse_json(messages))
    if not isinstance(messages, list):
        return [Place(messages, column, in_loss)]
    return [Place(item, f"{column}[{n}]", in_loss) for n, item in enumerate(messages)]


def column_of_messages(name: str) -> Callable[[Row], list[Place]]:
    return lambda row: places(row[name], name)


def read_prompt_completion(row: Row) -> list[Place]:
    """Prompt and completion may each be text or messages. The prompt is never in the loss."""
    prompt, completion = messages_or_text(row["prompt"]), messages_or_text(row["completion"])
    if not isinstance(prompt, list):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(completion, list):
        completion = [answer_message(completion, row)]
    return places(prompt, "prompt", in_loss=False) + places(completion, "completion")


def messages_or_text(value: Any) -> Any:
    """A list of messages if the value is one, also as JSON in a text; else the value as it is.

    An answer may well be JSON: text stays text unless it is nothing but messages with roles.
    """
    parsed = rows_of_columns(parse_json(value))
    if isinstance(parsed, dict) and isinstance(value, dict) and "role" in parsed:
        return [parsed]
    if isinstance(parsed, list) and parsed and all(is_message(item) for item in parsed):
        return parsed
    return value


def is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    role = value.get("role", value.get("from"))
    return isinstance(role, str) and bool(value.keys() & {"content", "value", "tool_calls"})


def answer_message(answer: Any, row: Row) -> Row:
    """The assistant's message in a column of its own."""
    thinking = {name: row[name] for name in THINKING_FIELDS if not is_absent(row.get(name))}
    return {"role": "assistant", "content": answer, **thinking, "is_column": True}


def single_exchange(
    question: str, answer: str, *, more: str | None = None, instructions: str | None = None
) -> Callable[[Row], list[Place]]:
    """A question and an answer in columns of their own, with the history before them.

    more: the column whose text is put behind the question. instructions: a developer's column.
    """

    def read(row: Row) -> list[Place]:
        texts = [row[question], row.get(more) if more else None]
        given = [text for text in texts if not is_absent(text)]
        is_joined = len(given) == 2 and all(isinstance(text, str) for text in given)
        text = "\n\n".join(given) if is_joined else (given or [texts[0]])[0]
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
    if is_absent(value) or value == []:
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
    texts = row["data"]
    if not isinstance(texts, list):
        return [Place(texts, "data")]
    return [
        Place({"role": ("user", "assistant")[n % 2], "content": text}, f"data[{n}]")
        for n, text in enumerate(texts)
    ]


# What may stand beside messages of any shape.
COMMON = {"tools", "functions", "function_call", "tool_choice", "reasoning_effort"}
COMMON |= {"system", "system_prompt", "systemInstruction", "chat_template_kwargs"}
EXCHANGE = {"history", *THINKING_FIELDS}
# The first match counts, so the richer shapes come first: `messages` may stand beside `text`.
SHAPES = {
    "messages": Shape({"messages"}, set(), column_of_messages("messages")),
    "ShareGPT conversations": Shape({"conversations"}, set(), column_of_messages("conversations")),
    "conversation": Shape({"conversation"}, set(), column_of_messages("conversation")),
    "Gemini contents": Shape({"contents"}, set(), column_of_messages("contents")),
    "prompt and completion": Shape(
        {"prompt", "completion"}, set(THINKING_FIELDS), read_prompt_completion
    ),
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
    "UltraChat data": Shape({"data"}, set(), read_dialogue),
    "plain text": Shape({"text"}, set(), lambda row: [Place(row["text"], "text")]),
}
