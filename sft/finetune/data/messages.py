"""A message of any known form, read as turns: what one role says, spelt as harmony.py reads it.

A turn has `role` and `content`; an assistant's also `thinking` and `tool_calls`, a tool's `name`
and `id`. `in_loss` is false where the row says so, and `kind` tells how an assistant's text was
marked. `where` is the place of the message in the row.
"""

from typing import Any

from finetune.data.assistant import NESTED_THINKING, THINKING_KEYS, assistant_parts, turns_of
from finetune.data.bare_calls import call_in_text
from finetune.data.calls import ARGUMENTS
from finetune.data.content import (
    CONTENT_KEYS,
    content_in_words,
    content_key,
    content_of,
    text_of_parts,
)
from finetune.data.findings import Findings
from finetune.data.loss_keys import (
    LOSS_KEYS,
    UNCLEAR_LOSS_KEYS,
    is_in_loss,
    note_prompt_in_loss,
)
from finetune.data.markup import foreign_tag, later_thinking, opening_of_template
from finetune.data.results import RESULT_KEYS, result_in_part, results_in_text, tool_turns
from finetune.data.shapes import ROLE_KEYS, ROLES, THINKING_FIELDS, Place, standard_role
from finetune.data.values import Row, is_absent, is_nothing, is_unicode, value_of

MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio", "image_url", "attachments")
PLAIN_KEYS = {"role", "content", *THINKING_FIELDS}
MESSAGE_KEYS = {*PLAIN_KEYS, *ROLE_KEYS, *CONTENT_KEYS, *THINKING_KEYS, "refusal", "is_column"}
MESSAGE_KEYS |= {"tool_calls", "function_call", "tools", "functions", "type"}
MESSAGE_KEYS |= {"channel", "recipient", "content_type", "author"}
MESSAGE_KEYS |= {*LOSS_KEYS, *UNCLEAR_LOSS_KEYS, *MEDIA_KEYS}
# The items of OpenAI's Responses API and LangChain's messages have a type in place of a role.
ROLES_OF_TYPES = {
    "function_call": "assistant",
    "reasoning": "assistant",
    "function_call_output": "tool",
    "human": "user",
    "ai": "assistant",
    "system": "system",
    "tool": "tool",
}


def read_message(
    place: Place, schemas: dict[str, Any], findings: Findings, *, is_from_table: bool
) -> list[Row]:
    """The turns of a message; none if it says nothing, as a blank system message does."""
    message, where = place.message, place.where
    if isinstance(message.get("author"), dict):  # harmony's own messages
        message = {**message["author"], **message}
    role = role_of(message)
    if role not in ROLES:
        findings.problems.append(unknown_role(message, where))
        return []
    if not message.keys() <= PLAIN_KEYS:
        check_keys(message, role, where, findings)
        if role != "assistant":
            note_prompt_in_loss(message, findings)
    if role == "assistant":
        parts = assistant_parts(message, where, findings)
        # A table gives each message, and each call, the keys of all others. Whether a row is of
        # one cannot be told of calls that have a column of their own, as xLAM's.
        turns = turns_of(
            parts,
            where,
            schemas,
            findings,
            has_added_nulls=is_from_table or not where.endswith("]"),
        )
    elif role == "tool":
        turns = tool_turns(message, where, findings, is_from_table=is_from_table)
    else:
        turns = plain_turns(message, role, where, findings)
    in_loss = is_in_loss(message, where, findings) and place.in_loss
    for turn in turns:
        turn["where"] = where
        if not in_loss:
            turn["in_loss"] = False
        check_text(turn, schemas, findings)
    return turns


def role_of(message: Row) -> str:
    role = value_of(message, *ROLE_KEYS)
    if role is None and message.get("type") in ROLES_OF_TYPES:
        return ROLES_OF_TYPES[message["type"]]
    if role is None and "parts" in message:  # Gemini's, of whom one that has no role is the user
        return "user"
    return standard_role(role)


def unknown_role(message: Row, where: str) -> str:
    given = value_of(message, *ROLE_KEYS)
    if given is None:
        return f"{where} has no `role`; its keys are {', '.join(map(str, message)) or '(none)'}"
    return f"{where} has the role {given!r}, not one of {', '.join(ROLES)}"


def check_text(turn: Row, schemas: dict[str, Any], findings: Findings) -> None:
    """Refuse what cannot be encoded; warn of another format's markup and of calls in a text."""
    for key in ("content", "thinking", "name"):
        if not is_unicode(turn.get(key) or ""):
            inside = "" if key == "content" else f" in its `{key}`"
            findings.problems.append(
                f"{turn['where']} has half a surrogate pair{inside}: no valid Unicode"
            )
    tag = None if turn["role"] == "tool" else foreign_tag(turn["content"])
    if tag is None and (thinking := turn.get("thinking")) and (left := foreign_tag(thinking)):
        findings.warnings.append(f"{turn['where']} has `{left}` in its thinking: left as it stands")
    if turn["role"] == "assistant" and tag is None:
        tag = later_thinking(turn["content"]) or call_in_text(turn["content"], schemas)
    if turn["role"] == "user" and (opening := opening_of_template(turn["content"])):
        tag = opening.strip()
    if tag is not None and not any(w.startswith(turn["where"]) for w in findings.warnings):
        findings.warnings.append(f"{turn['where']} has `{tag}` in its text: left as it stands")


def check_keys(message: Row, role: str, where: str, findings: Findings) -> None:
    """Refuse what cannot be rendered, and list the keys that are not read."""
    for key in MEDIA_KEYS:
        if not is_absent(message.get(key)) and message[key] != []:
            findings.problems.append(f"{where} has `{key}`: gpt-oss reads text only")
    if role != "assistant" and not is_nothing(message.get("tool_calls")):
        findings.problems.append(f"{where} has `tool_calls`, but only the assistant calls tools")
    known = MESSAGE_KEYS | RESULT_KEYS if role == "tool" else MESSAGE_KEYS
    if message.get("type") == "function_call":
        known = known | {"name", "id", "call_id", "status", *ARGUMENTS}
    if message.get("type") == "reasoning":
        known = known | {"summary"}
    read = content_key(message)
    spare = {key for key in CONTENT_KEYS if key != read and not is_nothing(message.get(key))}
    for outer, inner in NESTED_THINKING:
        if role == "assistant" and isinstance(holder := message.get(outer), dict):
            known = known | {outer}
            unread_inside = [k for k in holder if k != inner and not is_nothing(holder[k])]
            findings.unread.update(f"messages[].{outer}.{key}" for key in unread_inside)
    unread = [key for key in message.keys() - known | spare if not is_absent(message[key])]
    findings.unread.update(f"messages[].{key}" for key in unread)


def plain_turns(message: Row, role: str, where: str, findings: Findings) -> list[Row]:
    """A user's or a developer's turn. A user's message may hold the results of tools."""
    content = content_of(message)
    turns: list[Row] = []
    if isinstance(content, str) and role == "user":
        turns = results_in_text(content, findings)
        if turns:
            return turns
    if isinstance(content, list):
        others = []
        for part in content:
            answer = result_in_part(part) if role == "user" else None
            if answer is None:
                others.append(harmony_part(part))
            else:
                turns += tool_turns(answer, where, findings)
        if turns and not others:
            return turns
        content = others
    text = "" if content is None else text_of_parts(content)
    if text is None:
        findings.problems.append(f"{where} has {content_in_words(content)} as `content`, not text")
    elif not is_absent(text):
        turns.append({"role": role, "content": text})
    elif role == "user":
        findings.problems.append(f"{where} has empty `content`")
    return turns


def harmony_part(part: Any) -> Any:
    """A part of openai-harmony's system or developer message as a part of text.

    What its system message says beyond the reasoning effort (read_effort) is the server's to write.
    """
    if isinstance(part, dict) and part.get("type") == "developer_content":
        return {"type": "text", "text": part.get("instructions") or ""}
    if isinstance(part, dict) and part.get("type") == "system_content":
        return {"type": "text", "text": ""}
    return part
