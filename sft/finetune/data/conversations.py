"""Rows of every known shape, turned into the one shape of conversation that harmony.py renders.

That shape is {"messages": [...], "tools": [...], "reasoning_effort": ...}. A message has `role` and
`content`; an assistant's also `thinking` and `tool_calls`, a tool's also `name`. A message with
`in_loss` false is not trained on. A row of plain text becomes {"text": ...}.
"""

from typing import Any

from finetune.data.findings import Findings
from finetune.data.markup import TEMPLATES
from finetune.data.messages import MEDIA_KEYS, read_message, read_row_tools
from finetune.data.shapes import COMMON, SHAPES, Place, shape_of
from finetune.data.turns import INSTRUCTION_ROLES, join_turns
from finetune.data.values import (
    Row,
    is_absent,
    is_from_table,
    is_unicode,
    parse_json,
    type_in_words,
    value_of,
)

__all__ = ["SHAPES", "BadRow", "read_row", "shape_of", "to_conversation"]

INSTRUCTION_COLUMNS = ("system", "system_prompt", "systemInstruction")
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
    shape = shape_of(row)
    if shape is None:
        raise BadRow(f"the columns {', '.join(map(str, row)) or '(none)'} are of no known shape")
    known = SHAPES[shape].columns | SHAPES[shape].others | COMMON
    if not row.keys() <= known:
        for key in row.keys() - known:
            if key in MEDIA_KEYS and not is_absent(row[key]) and row[key] != []:
                findings.problems.append(f"`{key}`: gpt-oss reads text only")
            elif not is_absent(row[key]):
                findings.unread.add(str(key))
    if shape == "plain text":
        return read_document(row, findings)
    messages = SHAPES[shape].read(row)
    if not messages or not all(isinstance(place.message, dict) for place in messages):
        raise BadRow(
            *findings.problems, "the messages are not a list of objects with `role` and `content`"
        )
    tools = read_row_tools(row, findings)
    schemas = {tool["name"]: tool["parameters"] for tool in tools}
    from_table = is_from_table([place.message for place in messages])
    turns: list[Row] = []
    for place in messages:
        turns += read_message(place, schemas, findings, is_from_table=from_table)
    turns = with_row_instructions(row, turns, findings)
    effort = read_effort(row, findings)
    joined = join_turns(turns, findings)
    return {"messages": joined, "tools": tools, "reasoning_effort": effort}


def with_row_instructions(row: Row, turns: list[Row], findings: Findings) -> list[Row]:
    """The turns behind the instructions of a column, unless the messages have their own."""
    column = next((name for name in INSTRUCTION_COLUMNS if value_of(row, name)), None)
    if column is None:
        return turns
    if any(turn["role"] in INSTRUCTION_ROLES for turn in turns):
        findings.notes.append(f"column `{column}` not used, since the messages have their own")
        return turns
    value = row[column]
    if isinstance(value, dict) and "parts" in value:
        value = value["parts"]
    role = "developer" if "instruction" in row else "system"
    place = Place({"role": role, "content": value}, column)
    return read_message(place, {}, findings, is_from_table=False) + turns


def read_effort(row: Row, findings: Findings) -> str | None:
    """The row's own reasoning effort, from its column or from the chat template's arguments."""
    arguments = parse_json(row.get("chat_template_kwargs"))
    arguments = arguments if isinstance(arguments, dict) else {}
    findings.unread.update(
        f"chat_template_kwargs.{key}"
        for key, value in arguments.items()
        if key != "reasoning_effort" and value is not None
    )
    effort: Any = value_of(row, "reasoning_effort") or value_of(arguments, "reasoning_effort")
    if isinstance(effort, str) and effort.lower() in EFFORTS:
        return effort.lower()
    if effort is not None:
        findings.problems.append(
            f"`reasoning_effort` is {effort!r}, not one of {', '.join(EFFORTS)}"
        )
    return None


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
    elif text.lstrip().startswith(TEMPLATES):
        tag = next(tag for tag in TEMPLATES if text.lstrip().startswith(tag))
        findings.warnings.append(f"`text` begins with another model's `{tag}`: left as it stands")
    return {"text": text}
