"""Rows of every known shape, turned into the one shape of conversation that harmony.py renders.

That shape is {"messages": [...], "tools": [...], "reasoning_effort": ...}. A message has `role` and
`content`; an assistant's also `thinking` and `tool_calls`, a tool's also `name`. A message with
`in_loss` false is not trained on. A row of plain text becomes {"text": ...}.
"""

import json
from typing import Any

from finetune.data.content import content_of
from finetune.data.findings import Findings
from finetune.data.loss_keys import LOSS_KEYS, truth_of, with_row_loss
from finetune.data.markup import foreign_tag, opening_of_template
from finetune.data.messages import MEDIA_KEYS, read_message, role_of
from finetune.data.shapes import (
    ANSWER_COLUMNS,
    COMMON,
    INSTRUCTION_COLUMNS,
    SHAPES,
    THINKING_FIELDS,
    TOOL_COLUMNS,
    Place,
    answer_places,
    are_messages,
    is_assistant,
    is_chat_in_text,
    is_flag,
    is_glaive,
    is_message,
    json_of_value,
    row_thoughts,
    shape_of,
)
from finetune.data.shapes import places as places_of
from finetune.data.tools import read_row_tools
from finetune.data.turns import INSTRUCTION_ROLES, join_turns
from finetune.data.values import (
    Row,
    is_absent,
    is_from_table,
    is_nothing,
    is_unicode,
    parse_json,
    rows_of_columns,
    type_in_words,
    unique_keys,
    value_of,
)

__all__ = ["SHAPES", "BadRow", "read_row", "shape_of", "to_conversation"]

EFFORTS = ("low", "medium", "high")
MESSAGE_SHAPES = {"messages", "ShareGPT conversations", "conversation", "Gemini contents"}
MESSAGE_SHAPES |= {"Glaive chat"}
JSON_SHAPES = MESSAGE_SHAPES | {"query, tools and answers", "UltraChat data"}
PAIR = "it is a pair of answers (`chosen`, `rejected`): make the one to learn `completion`"
NO_CALLS = "`answers` holds no calls, as xLAM's does: a text to learn is called `response`"
# Whether an answer is to be learnt, in KTO's data of LLaMA-Factory and others.
KTO_KEYS = ("kto_tag", "desirable")
BAD_LABELS = ("rejected", "undesirable")


class BadRow(ValueError):
    """A row that is not a conversation. Each of its `args` describes one problem."""


def to_conversation(row: Row) -> Row:
    """The conversation in a row of any known shape. Raises BadRow with all of its problems."""
    conversation, _ = read_row(row)
    return conversation


def read_row(row: Row) -> tuple[Row, Findings]:
    """The conversation in a row, and what a user should know of how it was read. Raises BadRow."""
    findings = Findings()
    try:
        conversation = read_conversation(row, findings)
    except RecursionError:
        raise BadRow("it is nested too deep") from None
    if findings.problems:
        raise BadRow(*findings.problems)
    return conversation, findings


def read_conversation(row: Row, findings: Findings) -> Row:
    if problem := whole_table(row):
        raise BadRow(problem)
    shape = shape_of(row)
    if shape is None:
        raise BadRow(no_shape(row))
    check_columns(row, shape, findings)
    if shape == "plain text":
        return read_document(row, findings)
    check_texts(row, shape, findings)
    check_keys_once(row, shape, findings)
    if shape == "query, tools and answers" and not are_calls(row["answers"]):
        raise BadRow(*findings.problems, NO_CALLS)
    places = SHAPES[shape].read(row)
    check_places(places, shape, findings)
    if shape in MESSAGE_SHAPES:
        places += answer_beside(row, places, findings)
    messages = [place.message for place in places]
    tools = read_row_tools(row, messages, findings)
    schemas = {tool["name"]: tool["parameters"] for tool in tools}
    from_table = is_from_table(messages)
    turns: list[Row] = []
    for place in with_row_loss(row, places, findings):
        turns += read_message(place, schemas, findings, is_from_table=from_table)
    turns = with_row_instructions(row, shape, turns, findings)
    effort = read_effort(row, messages, findings)
    joined = join_turns(turns, findings)
    check_offered(joined, schemas, findings)
    return {"messages": joined, "tools": tools, "reasoning_effort": effort}


def whole_table(row: Row) -> str | None:
    """That an object holds all rows of a dataset, and how to write them; None if it holds one."""
    for name in ("data", "train", "test", "rows", "examples"):
        items = row.get(name)
        if isinstance(items, list) and items and isinstance(items[0], dict) and shape_of(items[0]):
            return f"it holds rows under `{name}`: make each of them a line of a .jsonl file"
    columns = list(row.values())
    for name, value in row.items():
        if isinstance(value, dict) and "0" in value and all(map(is_message, value.values())):
            return f"`{name}` holds messages by their numbers: make it a list of them"
    if columns and all(isinstance(column, dict) and "0" in column for column in columns):
        return (
            "it holds whole columns, as pandas writes them: to_json(orient='records', lines=True)"
        )
    return None


def no_shape(row: Row) -> str:
    """Why the columns of a row make no shape."""
    if {"chosen", "rejected"} <= row.keys():
        return PAIR
    for shape in SHAPES.values():
        if shape.columns <= row.keys():
            empty = sorted(name for name in shape.columns if row[name] is None)
            return f"`{'` and `'.join(empty)}` is null"
    names = ", ".join(map(str, row)) or "(none)"
    return f"the columns {names} are of no known shape (one that is null counts as missing)"


def check_columns(row: Row, shape: str, findings: Findings) -> None:
    """Refuse columns that cannot be rendered, and list those that are not read."""
    known = SHAPES[shape].columns | SHAPES[shape].others | COMMON
    for key in row.keys() - known:
        value = row[key]
        if key in MEDIA_KEYS:
            if not is_nothing(value):
                findings.problems.append(f"`{key}`: gpt-oss reads text only")
        elif key == "history" and not is_nothing(value):
            columns = " and ".join(f"`{name}`" for name in sorted(SHAPES[shape].columns))
            findings.problems.append(f"`history` beside {columns}: put it into the messages")
        elif problem := verdict_of_rater(key, value, is_document=shape == "plain text"):
            findings.problems.append(problem)
        elif key in LOSS_KEYS and shape != "plain text":
            continue  # with_row_loss reads it
        elif not (is_absent(value) or (key == "reasoning" and isinstance(value, dict))):
            findings.unread.add(str(key))


def verdict_of_rater(key: str, value: Any, *, is_document: bool) -> str | None:
    """Why a row is refused whose answer somebody has found bad; None if nobody has.

    KTO_KEYS speak of nothing else. `label` may well be a class: only what stands for true and false
    is clear, and beside a document only if it is no number.
    """
    if key not in ("label", *KTO_KEYS) or is_absent(value):
        return None
    if key in KTO_KEYS and truth_of(value) is None:
        return f"`{key}` is {value!r}, neither true nor false: is the answer to be learnt?"
    is_word = isinstance(value, bool) or str(value).strip().lower() == "false"
    is_bad = truth_of(value) is False and (is_word or not is_document)
    is_bad = is_bad or (isinstance(value, str) and value.strip().lower() in BAD_LABELS)
    if not is_bad:
        return None
    said = "false" if value is False else value
    return f"`{key}` is {said}: as in preference data, an answer that is not to be learnt"


def check_texts(row: Row, shape: str, findings: Findings) -> None:
    """Tell how columns were read that may hold text and messages, or thinking and a flag."""
    if shape in MESSAGE_SHAPES:
        return
    answers = {"completion", "response", "output", "final"}
    more = [name for name in ("input", "context") if name in SHAPES[shape].others]
    has_more = any(not is_absent(json_of_value(row.get(name))) for name in more)
    for column in sorted(SHAPES[shape].columns - {"answers", "data"}):
        value, is_answer = row[column], column in answers
        holds_messages = are_messages(value, is_answer=is_answer)
        choices = value.get("choices") if isinstance(value, dict) and is_answer else None
        if isinstance(choices, list) and len(choices) > 1:
            number = len(choices)
            findings.problems.append(f"{column} holds {number} choices: keep the one to learn")
        if has_more and holds_messages and not is_answer and not isinstance(value, str):
            findings.problems.append(f"`{more[0]}` beside messages in `{column}`: put it into them")
        elif is_chat_in_text(value) and holds_messages and not (has_more and not is_answer):
            findings.notes.append(f"JSON of messages in the text of `{column}` read as messages")
        elif is_chat_in_text(value):
            findings.warnings.append(
                f"{column} has messages as JSON in its text: left as it stands"
            )
        if is_answer:
            check_thoughts(row, value, column, findings)


def check_thoughts(row: Row, answer: Any, column: str, findings: Findings) -> None:
    """Tell of flags in columns of thinking, and refuse thinking that nobody can give a place."""
    for name in (*THINKING_FIELDS, "analysis"):
        if name == "analysis" and column != "final":
            continue  # only Multilingual-Thinking has it as a column
        if not is_absent(row.get(name)) and is_flag(row[name]):
            findings.notes.append(f"`{name}` is {row[name]!r}, a flag and no thought: not learnt")
    thoughts = list(row_thoughts(row))
    if not thoughts or not are_messages(answer, is_answer=True):
        return
    number = sum(is_assistant(place.message) for place in places_of(answer, column))
    if number != 1:
        findings.problems.append(
            f"`{thoughts[0]}` beside {number} messages of the assistant in `{column}`: "
            "put it into the one that it belongs to"
        )


def check_keys_once(row: Row, shape: str, findings: Findings) -> None:
    """Refuse JSON in a text that has a key twice: the last one would win without a word."""
    columns = (*SHAPES[shape].columns, *TOOL_COLUMNS, "history", "chat_template_kwargs")
    for column in sorted(columns):
        value = row.get(column)
        is_read = column not in SHAPES[shape].columns or shape in JSON_SHAPES
        if not isinstance(value, str) or not (is_read or is_chat_in_text(value)):
            continue
        try:
            json.loads(value, object_pairs_hook=unique_keys)
        except (json.JSONDecodeError, RecursionError):
            continue  # text, or what the reader of the column says it is
        except ValueError as error:
            findings.problems.append(f"`{column}`: {error}")


def are_calls(value: Any) -> bool:
    """Whether a column of xLAM's holds at least one call."""
    calls = rows_of_columns(parse_json(value))
    calls = calls if isinstance(calls, list) else [calls]
    return any(isinstance(parse_json(call), dict) for call in calls)


def answer_beside(row: Row, places: list[Place], findings: Findings) -> list[Place]:
    """The answer in a column beside messages that end with a question, if it is clear which one.

    Without it the question would be cut off, and an earlier answer trained on in its place.
    """
    if role_of(places[-1].message) not in ("user", "tool"):
        return []
    if any(not is_nothing(row.get(name)) for name in ("chosen", "rejected")):
        raise BadRow(*findings.problems, PAIR)
    columns = [name for name in ANSWER_COLUMNS if not is_nothing(row.get(name))]
    if len(columns) > 1:
        names = " and ".join(f"`{name}`" for name in columns)
        findings.problems.append(
            f"{names} beside messages without an answer: keep the one to learn"
        )
    if len(columns) != 1:
        return []
    findings.unread -= {columns[0], *row_thoughts(row)}
    findings.notes.append(f"`{columns[0]}` read as the answer to the messages beside it")
    check_thoughts(row, row[columns[0]], columns[0], findings)
    return answer_places(row[columns[0]], columns[0], row)


def check_places(places: list[Place], shape: str, findings: Findings) -> None:
    """Raise BadRow unless there are messages, and all of them are objects."""
    wrong = [place for place in places if not isinstance(place.message, dict)]
    problems = []
    for message, where, _ in wrong:
        what = "text that is not JSON" if isinstance(message, str) else type_in_words(message)
        problems.append(f"{where} is {what}, not an object with `role` and `content`")
    if not places:
        columns = " and ".join(sorted(SHAPES[shape].columns))
        problems.append(f"there are no messages in `{columns}`")
    if problems:
        raise BadRow(*findings.problems, *problems)


def check_offered(turns: list[Row], schemas: Row, findings: Findings) -> None:
    """Note calls of functions that the row does not offer: a server offers those that it knows."""
    called = {call["name"] for turn in turns for call in turn.get("tool_calls") or []}
    if not called <= schemas.keys():
        findings.notes.append("calls of functions that `tools` does not offer")


def with_row_instructions(row: Row, shape: str, turns: list[Row], findings: Findings) -> list[Row]:
    """The turns behind the instructions of a column, unless the messages have their own.

    Columns that say different things are a problem: nobody can tell which one the model saw.
    """
    given = {name: row.get(name) for name in INSTRUCTION_COLUMNS}
    given["chat_template_kwargs.custom_instructions"] = template_arguments(row).get(
        "custom_instructions"
    )
    in_messages = {name for name in given if name in SHAPES[shape].others}
    if is_glaive(row) and isinstance(row.get("system"), str):
        in_messages.add("system")
    own = [turn["content"] for turn in turns if turn["role"] in INSTRUCTION_ROLES]
    read: dict[str, list[Row]] = {}
    for name, value in given.items():
        if is_nothing(value):
            continue
        if isinstance(value, dict) and content_of(value) is not None:
            value = content_of(value)
        is_developer = name == "developer" or "instruction" in row
        message = {"role": "developer" if is_developer else "system", "content": value}
        read[name] = read_message(Place(message, name), {}, findings, is_from_table=False)
    texts = {name: "".join(turn["content"] for turn in found) for name, found in read.items()}
    if len(set(texts.values())) > 1:
        names = " and ".join(f"`{name}`" for name in texts)
        findings.problems.append(f"{names} hold different instructions: keep one of them")
        return turns
    columns = [name for name in read if name not in in_messages]
    if not columns or in_messages & read.keys():
        return turns
    if own:
        if texts[columns[0]] not in own:
            findings.notes.append(
                f"column `{columns[0]}` not used, since the messages have their own"
            )
        return turns
    return read[columns[0]] + turns


def template_arguments(row: Row) -> Row:
    """The chat template's arguments, which smoltalk2 keeps its tools and instructions in."""
    arguments = parse_json(row.get("chat_template_kwargs"))
    return arguments if isinstance(arguments, dict) else {}


def read_effort(row: Row, messages: list[Row], findings: Findings) -> str | None:
    """The row's own reasoning effort.

    It is in a column, in the chat template's arguments, in `reasoning` as OpenAI's API has it, or
    in openai-harmony's own system message.
    """
    arguments = template_arguments(row)
    read = ("reasoning_effort", "custom_instructions", "xml_tools", "python_tools")
    findings.unread.update(
        f"chat_template_kwargs.{key}"
        for key, value in arguments.items()
        if key not in read and value is not None
    )
    if not is_nothing(arguments.get("python_tools")):
        findings.problems.append(
            "`chat_template_kwargs.python_tools` are called by Python code, which is no call of "
            "gpt-oss: write them and their calls as `tools` and `tool_calls`"
        )
    reasoning = row.get("reasoning")
    reasoning = reasoning if isinstance(reasoning, dict) else {}
    given = [value_of(row, "reasoning_effort"), value_of(arguments, "reasoning_effort")]
    given.append(value_of(reasoning, "effort"))
    for message in messages:
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else []:
            if isinstance(part, dict) and part.get("type") == "system_content":
                given.append(value_of(part, "reasoning_effort"))
    efforts = {e.strip().lower() if isinstance(e, str) else e for e in map(hashable, given)} - {
        None
    }
    wrong = [effort for effort in efforts if effort not in EFFORTS]
    if wrong:
        findings.problems.append(
            f"`reasoning_effort` is {wrong[0]!r}, not one of {', '.join(EFFORTS)}"
        )
    elif len(efforts) > 1:
        findings.problems.append(
            f"two different reasoning efforts: {' and '.join(sorted(map(str, efforts)))}"
        )
    return next(iter(efforts)) if len(efforts) == 1 and not wrong else None


def hashable(value: Any) -> Any:
    return str(value) if isinstance(value, list | dict) else value


def read_document(row: Row, findings: Findings) -> Row:
    """A row of plain text."""
    text = row["text"]
    if "role" in row or "parent_id" in row:
        findings.problems.append(
            "it is one message of a conversation (`text` with `role` or `parent_id`): "
            "make each conversation one row of `messages`"
        )
    elif not isinstance(text, str):
        findings.problems.append(f"`text` is {type_in_words(text)}, not text")
    elif is_absent(text):
        findings.problems.append("`text` is empty")
    elif text.lstrip().startswith("<|start|>"):
        # Its control tokens would be encoded as text, and the model would learn to spell them out.
        findings.problems.append("`text` is rendered already: give the `messages` it was made from")
    elif not is_unicode(text):
        findings.problems.append("`text` has half a surrogate pair: not valid Unicode")
    elif tag := opening_of_template(text.lstrip()):
        findings.warnings.append(f"`text` begins with another model's `{tag}`: left as it stands")
    elif foreign_tag(text):
        findings.warnings.append(f"`text` has `{foreign_tag(text)}` in it: left as it stands")
    return {"text": text}
