"""Rows of every known shape, turned into the one shape of conversation that harmony.py renders.

That shape is {"messages": [...], "tools": [...], "reasoning_effort": ...}. A message has `role` and
`content`; an assistant's also `thinking` and `tool_calls`, a tool's also `name`. A message with
`in_loss` false is not trained on. A row of plain text becomes {"text": ...}.
"""

from typing import Any

from finetune.data.content import content_of
from finetune.data.findings import Findings
from finetune.data.loss_keys import LOSS_KEYS, with_row_loss
from finetune.data.markup import foreign_tag, opening_of_template
from finetune.data.messages import MEDIA_KEYS, read_message
from finetune.data.shapes import COMMON, INSTRUCTION_COLUMNS, SHAPES, Place, shape_of
from finetune.data.tools import read_row_tools
from finetune.data.turns import INSTRUCTION_ROLES, join_turns
from finetune.data.values import (
    Row,
    is_absent,
    is_from_table,
    is_nothing,
    is_unicode,
    parse_json,
    type_in_words,
    value_of,
)

__all__ = ["SHAPES", "BadRow", "read_row", "shape_of", "to_conversation"]

EFFORTS = ("low", "medium", "high")


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
    places = SHAPES[shape].read(row)
    check_places(places, shape, findings)
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
    if columns and all(isinstance(column, dict) and "0" in column for column in columns):
        return (
            "it holds whole columns, as pandas writes them: to_json(orient='records', lines=True)"
        )
    return None


def no_shape(row: Row) -> str:
    """Why the columns of a row make no shape."""
    if {"chosen", "rejected"} <= row.keys():
        return "it is a pair of answers (`chosen`, `rejected`): make the one to learn `completion`"
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
        elif key == "label" and value is False:
            findings.problems.append(
                "`label` is false: as in preference data, an answer that is not to be learnt"
            )
        elif key in LOSS_KEYS and shape != "plain text":
            continue  # with_row_loss reads it
        elif not (is_absent(value) or (key == "reasoning" and isinstance(value, dict))):
            findings.unread.add(str(key))


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
    """The turns behind the instructions of a column, unless the messages have their own."""
    columns = [
        name
        for name in INSTRUCTION_COLUMNS
        if not is_nothing(row.get(name)) and name not in SHAPES[shape].others
    ]
    read: list[Row] = []
    for number, name in enumerate(columns):
        value = row[name]
        if isinstance(value, dict) and content_of(value) is not None:
            value = content_of(value)
        is_developer = name == "developer" or "instruction" in row
        message = {"role": "developer" if is_developer else "system", "content": value}
        own = read_message(Place(message, name), {}, findings, is_from_table=False)
        others = [turn["content"] for turn in turns if turn["role"] in INSTRUCTION_ROLES]
        others += [turn["content"] for turn in read]
        if number == 0 and not others:
            read = own
        elif any(turn["content"] not in others for turn in own):
            whose = "the messages have their own" if not read else f"there is `{columns[0]}`"
            findings.notes.append(f"column `{name}` not used, since {whose}")
    return read + turns


def read_effort(row: Row, messages: list[Row], findings: Findings) -> str | None:
    """The row's own reasoning effort.

    It is in a column, in the chat template's arguments, in `reasoning` as OpenAI's API has it, or
    in openai-harmony's own system message.
    """
    arguments = parse_json(row.get("chat_template_kwargs"))
    arguments = arguments if isinstance(arguments, dict) else {}
    findings.unread.update(
        f"chat_template_kwargs.{key}"
        for key, value in arguments.items()
        if key != "reasoning_effort" and value is not None
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
