"""The results of tools, from the forms in which datasets keep them."""

import re
from typing import Any

from finetune.data.content import content_of, text_of_parts
from finetune.data.findings import Findings
from finetune.data.markup import read_results
from finetune.data.values import (
    Row,
    json_text,
    parse_json,
    type_in_words,
    value_of,
    without_nulls,
)

ID_KEYS = ("tool_call_id", "tool_use_id", "call_id")
RESULT_KEYS = {*ID_KEYS, "name", "tool_name", "id", "is_error", "status"}
RESULT_NOTE = "`<tool_response>` read as results"


def results_in_text(text: str, findings: Findings) -> list[Row]:
    """The results in a text that holds nothing but `<tool_response>`; empty if it holds more."""
    results = read_results(text)
    if not results:
        return []
    findings.notes.append(RESULT_NOTE)
    return [result_turn(result) for result in results]


def result_turn(text: str) -> Row:
    """A tool's result as Hermes writes it: maybe {"name": ..., "content": ...} as JSON."""
    value = parse_json(text)
    if isinstance(value, dict) and {"name", "content"} <= value.keys() <= {
        "name",
        "content",
        "tool_call_id",
    }:
        name, call_id, value = value["name"], value.get("tool_call_id"), value["content"]
        text = value if isinstance(value, str) else json_text(value)
        return {"role": "tool", "content": text, "name": str(name), "id": call_id}
    return {"role": "tool", "content": text, "name": None, "id": None}


def result_in_part(part: Any) -> Row | None:
    """The message of a tool that a part of Anthropic's or Google's messages is; None if it is none.

    Google's parts are spelt `functionResponse` or `function_response`.
    """
    if not isinstance(part, dict):
        return None
    if part.get("type") == "tool_result":
        return {"content": "", **part}
    answer = part.get("functionResponse", part.get("function_response"))
    if not isinstance(answer, dict):
        return None
    return {"name": answer.get("name"), "id": answer.get("id"), "content": answer.get("response")}


def tool_turns(
    message: Row, where: str, findings: Findings, *, is_from_table: bool = False
) -> list[Row]:
    """The results in a tool's message. Whatever is not text is written as JSON."""
    content = content_of(message)
    parts = content if isinstance(content, list) else []
    inner = [answer for part in parts if (answer := result_in_part(part)) is not None]
    if inner and len(inner) == len(parts):
        return [turn for answer in inner for turn in tool_turns(answer, where, findings)]
    call_id, name = identity_of(message, where, findings)
    text = None if content == [] else text_of_parts(content)
    if content is None:
        findings.problems.append(f"{where} has no `content`: what did the tool return?")
    elif text is None:
        if any("image" in str(part.get("type")) for part in parts if isinstance(part, dict)):
            findings.problems.append(f"{where} has an image as `content`, not text")
        try:
            text = json_text(without_nulls(content) if is_from_table else content)
        except ValueError as error:
            findings.problems.append(f"{where} has `content` that {error}")
    spelt = results_in_text(text, findings) if text else []
    if len(spelt) == 1:
        return [{**spelt[0], "name": spelt[0]["name"] or name, "id": call_id or spelt[0]["id"]}]
    return spelt or [{"role": "tool", "content": text or "", "name": name, "id": call_id}]


def identity_of(message: Row, where: str, findings: Findings) -> tuple[Any, str | None]:
    """The id of the call that a result answers, and the name of its function, if it has them."""
    call_id = value_of(message, *ID_KEYS, "id")
    name = value_of(message, "name", "tool_name")
    if isinstance(call_id, list | dict):
        what = type_in_words(call_id)
        findings.problems.append(f"{where} has {what} as the id of a call, not text")
        call_id = None
    if name is not None and not isinstance(name, str):
        findings.problems.append(f"{where} has {type_in_words(name)} as `name`, not text")
        name = None
    return call_id, re.sub(r"^functions\.", "", name.strip()) if name else None
