"""A message of any known form, read as turns: what one role says, spelt as harmony.py reads it.

A turn has `role` and `content`; an assistant's also `thinking` and `tool_calls`, a tool's `name`
and `id`. `in_loss` is false where the row says so, and `kind` tells how an assistant's text was
marked. `where` is the place of the message in the row.
"""

from typing import Any

from finetune.data.calls import ARGUMENTS, CALL_TYPES, read_call
from finetune.data.findings import Findings
from finetune.data.markup import Part, Unclear, read_markup, read_results
from finetune.data.shapes import ROLES, THINKING_FIELDS, Place
from finetune.data.tools import read_tools
from finetune.data.values import (
    Row,
    is_absent,
    is_unicode,
    json_text,
    parse_json,
    rows_of_columns,
    type_in_words,
    value_of,
    without_nulls,
)

ROLE_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
}
CALLING_ROLES = ("function_call", "tool_call")
# Each says whether a message is trained on: ms-swift's, axolotl's, OpenAI's, and others'.
LOSS_KEYS = ("loss", "train", "training", "trainable", "loss_mask", "weight")
TRUE, FALSE = (True, 1, "1", "true", "True", "1.0"), (False, 0, "0", "false", "False", "0.0")
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")
ID_KEYS = ("tool_call_id", "tool_use_id", "call_id")
PLAIN_KEYS = {"role", "content", *THINKING_FIELDS}
MESSAGE_KEYS = PLAIN_KEYS | {"from", "value", "parts", "tool_calls", "function_call", "type"}
MESSAGE_KEYS |= {"channel", "recipient", "content_type", "is_column", "refusal", "output"}
MESSAGE_KEYS |= {*LOSS_KEYS, *MEDIA_KEYS}
RESULT_KEYS = {*ID_KEYS, "name", "tool_name", "id"}
CHANNELS = {"analysis": "thinking", "commentary": "preamble", "final": "final"}
TEXT_TYPES = ("text", "input_text", "output_text", "reasoning_text", "summary_text")


def read_message(
    place: Place, schemas: dict[str, Any], findings: Findings, *, is_from_table: bool
) -> list[Row]:
    """The turns of a message; none if it says nothing, as a blank system message does."""
    message, where = place.message, place.where
    if message.keys() <= PLAIN_KEYS and isinstance(message.get("content"), str):
        role = message.get("role")
        if role == "user" and not message["content"].lstrip().startswith("<tool_response>"):
            return [checked({"role": role, "content": message["content"]}, place, findings)]
    role = role_of(message)
    if role not in ROLES:
        given = message.get("role", message.get("from"))
        findings.problems.append(f"{where} has the role {given!r}, not one of {', '.join(ROLES)}")
        return []
    check_keys(message, role, where, findings)
    if role == "assistant":
        parts = assistant_parts(message, where, findings)
        turns = turns_of(parts, where, schemas, findings)
    elif role == "tool":
        turns = [tool_turn(message, where, findings, is_from_table=is_from_table)]
    else:
        turns = plain_turns(message, role, where, findings)
    in_loss = is_in_loss(message, where, findings) and place.in_loss
    for turn in turns:
        turn["where"] = where
        if not in_loss:
            turn["in_loss"] = False
        check_unicode(turn, findings)
    return turns


def checked(turn: Row, place: Place, findings: Findings) -> Row:
    """A user's turn, with its place. Blank text is a problem."""
    turn["where"] = place.where
    if not place.in_loss:
        turn["in_loss"] = False
    if is_absent(turn["content"]):
        findings.problems.append(f"{place.where} has empty `content`")
    check_unicode(turn, findings)
    return turn


def check_unicode(turn: Row, findings: Findings) -> None:
    for text in (turn["content"], turn.get("thinking") or ""):
        if not is_unicode(text):
            findings.problems.append(f"{turn['where']} has half a surrogate pair: no valid Unicode")


def role_of(message: Row) -> str:
    role = value_of(message, "role", "from")
    if role is None:
        kind = message.get("type")  # the items of OpenAI's Responses API
        return {"function_call": "assistant", "function_call_output": "tool"}.get(str(kind), "")
    name = str(role).lower() if isinstance(role, str) else ""
    return ROLE_NAMES.get(name, name)


def check_keys(message: Row, role: str, where: str, findings: Findings) -> None:
    """Refuse what cannot be rendered, and list the keys that are not read."""
    for key in MEDIA_KEYS:
        if not is_absent(message.get(key)) and message[key] != []:
            findings.problems.append(f"{where} has `{key}`: gpt-oss reads text only")
    calls = message.get("tool_calls")
    if role != "assistant" and not is_absent(calls) and calls != []:
        findings.problems.append(f"{where} has `tool_calls`, but only the assistant calls tools")
    known = MESSAGE_KEYS | RESULT_KEYS if role == "tool" else MESSAGE_KEYS
    if message.get("type") == "function_call":
        known = known | {"name", "id", "call_id", "status", *ARGUMENTS}
    if not message.keys() <= known:
        unread = (key for key in message.keys() - known if not is_absent(message[key]))
        findings.unread.update(f"messages[].{key}" for key in unread)


def is_in_loss(message: Row, where: str, findings: Findings) -> bool:
    """What the keys in LOSS_KEYS say."""
    answers = set()
    for key in LOSS_KEYS:
        value = message.get(key)
        if is_absent(value):
            continue
        if isinstance(value, bool | int | float | str) and value in TRUE:
            answers.add(True)
        elif isinstance(value, bool | int | float | str) and value in FALSE:
            answers.add(False)
        else:
            findings.problems.append(f"{where} has {value!r} as `{key}`, not 0 or 1")
    if len(answers) == 2:
        findings.problems.append(f"{where}: {', '.join(LOSS_KEYS)} contradict each other")
    return False not in answers


def content_of(message: Row) -> Any:
    names = ("content", "value", "parts", "output")
    content = next((message[name] for name in names if message.get(name) is not None), None)
    if content is None and not is_absent(message.get("refusal")):
        return message["refusal"]
    return None if isinstance(content, float) and is_absent(content) else content


def text_of_parts(content: Any) -> str | None:
    """The text of `content`, which may be a list of text parts. None if it is anything else."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(is_text_part(part) for part in content):
        return "".join(part["text"] for part in content)
    return None


def is_text_part(part: Any) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        return False
    if part.get("thought") is True:
        return False
    return part.get("type") in TEXT_TYPES or (part.get("type") is None and "text" in part)


def plain_turns(message: Row, role: str, where: str, findings: Findings) -> list[Row]:
    """A user's or a developer's turn. A user's message may hold the results of tools."""
    content = content_of(message)
    if isinstance(content, str) and role == "user":
        results = read_results(content)
        if results:
            findings.notes.append("`<tool_response>` read as results")
            return [result_turn(text, findings) for text in results]
    turns: list[Row] = []
    if isinstance(content, list) and role == "user":
        others = []
        for part in content:
            if isinstance(part, dict) and part.get("type") == "tool_result":
                turns.append(tool_turn(part, where, findings, is_from_table=False))
            elif isinstance(part, dict) and isinstance(part.get("functionResponse"), dict):
                answer = part["functionResponse"]
                answer = {"name": answer.get("name"), "content": answer.get("response")}
                turns.append(tool_turn(answer, where, findings, is_from_table=False))
            else:
                others.append(part)
        if turns and not others:
            return turns
        content = others
    if isinstance(content, list):
        content = [read_harmony_part(part, findings) for part in content]
    text = "" if content is None else text_of_parts(content)
    if text is None:
        findings.problems.append(f"{where} has {content_in_words(content)} as `content`, not text")
    elif not is_absent(text):
        turns.append({"role": role, "content": text})
    elif role == "user":
        findings.problems.append(f"{where} has empty `content`")
    return turns


def read_harmony_part(part: Any, findings: Findings) -> Any:
    """A part of openai-harmony's developer message as a part of text."""
    if isinstance(part, dict) and part.get("type") == "developer_content":
        return {"type": "text", "text": part.get("instructions") or ""}
    return part


def content_in_words(content: Any) -> str:
    if isinstance(content, list):
        kinds = [p.get("type") for p in content if isinstance(p, dict) and not is_text_part(p)]
        if kinds and kinds[0]:
            return f"a part of type {kinds[0]!r}"
    return type_in_words(content)


def result_turn(text: str, findings: Findings) -> Row:
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


def tool_turn(message: Row, where: str, findings: Findings, *, is_from_table: bool) -> Row:
    """A tool's result. Whatever is not text is written as JSON."""
    content = content_of(message)
    call_id = value_of(message, *ID_KEYS, "id")
    name = value_of(message, "name", "tool_name")
    if isinstance(call_id, list | dict):
        what = type_in_words(call_id)
        findings.problems.append(f"{where} has {what} as the id of a call, not text")
        call_id = None
    if name is not None and not isinstance(name, str):
        findings.problems.append(f"{where} has {type_in_words(name)} as `name`, not text")
        name = None
    text = text_of_parts(content)
    if content is None:
        findings.problems.append(f"{where} has no `content`: what did the tool return?")
    elif text is None:
        kinds = (
            [part.get("type") for part in content if isinstance(part, dict)]
            if (isinstance(content, list))
            else []
        )
        if any("image" in str(kind) for kind in kinds):
            findings.problems.append(f"{where} has an image as `content`, not text")
        try:
            text = json_text(without_nulls(content) if is_from_table else content)
        except ValueError as error:
            findings.problems.append(f"{where} has `content` that {error}")
    results = read_results(text) if text else None
    if results and len(results) == 1:
        findings.notes.append("`<tool_response>` read as results")
        turn = result_turn(results[0], findings)
        return {**turn, "name": turn["name"] or name, "id": call_id or turn["id"]}
    name = name.removeprefix("functions.") if name else None
    return {"role": "tool", "content": text or "", "name": name, "id": call_id}


def assistant_parts(message: Row, where: str, findings: Findings) -> list[Part]:
    """What the assistant writes in a message, in order."""
    content = content_of(message)
    thoughts = [message[n] for n in THINKING_FIELDS if not is_absent(message.get(n))]
    thoughts = [text_of_parts(t) if isinstance(t, list) else t for t in thoughts]
    parts = []
    for thinking in thoughts[:1]:
        if isinstance(thinking, str):
            parts.append(Part("thinking", thinking))
        else:
            what = type_in_words(thinking)
            findings.problems.append(f"{where} has {what} as `thinking`, not text")
    if any(thought != thoughts[0] for thought in thoughts[1:]):
        findings.problems.append(f"{where} has two different thoughts in {THINKING_FIELDS}")
    role = str(message.get("role", message.get("from"))).lower()
    if message.get("type") == "function_call":
        return [*parts, Part("call", message)]
    if role in CALLING_ROLES:
        calls = parse_json(content)
        return [*parts, *(Part("call", c) for c in (calls if isinstance(calls, list) else [calls]))]
    if message.get("channel") or message.get("recipient"):
        return parts + native_parts(message, content, where, findings)
    parts += content_parts(message, content, where, findings)
    if sum(part.kind == "thinking" for part in parts) > 1 and thoughts:
        texts = [part.value for part in parts if part.kind == "thinking"]
        if isinstance(content, str) and len(set(texts)) > 1:
            findings.problems.append(f"{where} has thinking beside its `content` and inside it")
        parts = parts[1:]
    return parts + call_parts(message, where, findings)


def call_parts(message: Row, where: str, findings: Findings) -> list[Part]:
    """The calls beside the content, in today's form or in OpenAI's earlier one."""
    calls = message.get("tool_calls")
    calls = [] if is_absent(calls) else rows_of_columns(parse_json(calls))
    if not isinstance(calls, list):
        what = type_in_words(calls)
        findings.problems.append(f"{where} has {what} as `tool_calls`, not a list")
        calls = []
    earlier = parse_json(message.get("function_call"))
    if not is_absent(earlier):
        calls = [*calls, earlier]
    return [Part("call", parse_json(call)) for call in calls]


def native_parts(message: Row, content: Any, where: str, findings: Findings) -> list[Part]:
    """A message of harmony: its channel and its recipient say what it is."""
    channel, recipient = message.get("channel"), value_of(message, "recipient")
    text = text_of_parts(content)
    if text is None:
        findings.problems.append(f"{where} has {type_in_words(content)} as `content`, not text")
        return []
    if recipient not in (None, "all"):
        if not str(recipient).startswith("functions."):
            findings.problems.append(
                f"{where} has the recipient {recipient!r}: only calls of functions are rendered"
            )
        return [Part("call", {"name": str(recipient), "arguments": text})]
    if channel not in CHANNELS:
        known = ", ".join(CHANNELS)
        findings.problems.append(f"{where} has the channel {channel!r}, not one of {known}")
        return []
    return [Part(CHANNELS[channel], text), *call_parts(message, where, findings)]


def content_parts(message: Row, content: Any, where: str, findings: Findings) -> list[Part]:
    """The parts of an assistant's content: text, maybe with markup, or a list of typed parts."""
    if content is None:
        return []
    if message.get("is_column") and not isinstance(content, str | bool | list):
        try:
            return [Part("text", json_text(content))]
        except ValueError as error:
            findings.problems.append(f"{where} {error}")
            return []
    text = text_of_parts(content)
    if text is None and isinstance(content, list):
        typed = [typed_part(part) for part in content]
        known = [part for part in typed if part is not None]
        if len(known) == len(typed):
            return known
        if message.get("is_column") and not any(
            isinstance(part, dict) and part.get("type") for part in content
        ):
            return [Part("text", json_text(content))]
    if text is None:
        findings.problems.append(f"{where} has {content_in_words(content)} as `content`, not text")
        return []
    try:
        read = read_markup(text)
    except Unclear as error:
        findings.warnings.append(f"{where} has {error}: left as it stands")
        read = None
    if read is None:
        return [] if is_absent(text) else [Part("text", text)]
    found, notes = read
    findings.notes += notes
    return found


def typed_part(part: Any) -> Part | None:
    """A part of a list of parts, as OpenAI, Anthropic and Google write them; None if unknown."""
    if not isinstance(part, dict):
        return None
    kind, text = part.get("type"), part.get("text")
    if isinstance(part.get("functionCall"), dict):
        return Part("call", part["functionCall"])
    if kind in CALL_TYPES:
        return Part("call", part)
    if kind in ("reasoning", "thinking", "thought") or part.get("thought") is True:
        inner = next(
            (
                part[k]
                for k in ("thinking", "reasoning", "text", "content", "summary")
                if part.get(k)
            ),
            "",
        )
        thinking = text_of_parts(inner)
        return None if thinking is None else Part("thinking", thinking)
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return Part("text", part["refusal"])
    return Part("text", text) if is_text_part(part) else None


def turns_of(
    parts: list[Part], where: str, schemas: dict[str, Any], findings: Findings
) -> list[Row]:
    """The parts as turns: each with thinking, then text, then calls, as far as it has them."""
    turns: list[Row] = []
    number = 0
    for part in parts:
        if part.kind != "call" and is_absent(part.value):
            continue
        turn = turns[-1] if turns else None
        if turn is None or not fits(part, turn):
            turn = {"role": "assistant", "content": "", "thinking": None, "tool_calls": []}
            turns.append(turn)
        if part.kind == "thinking":
            turn["thinking"] = part.value
        elif part.kind == "call":
            call = read_call(part.value, f"{where}.tool_calls[{number}]", schemas, findings)
            turn["tool_calls"].append(call)
            number += 1
        elif part.kind == turn.get("kind") == "text":
            turn["content"] += part.value
        else:
            turn["content"], turn["kind"] = part.value, part.kind
    return turns or [{"role": "assistant", "content": "", "thinking": None, "tool_calls": []}]


def fits(part: Part, turn: Row) -> bool:
    """Whether the part can still be written into the turn without a change of order."""
    if part.kind == "call":
        return turn.get("kind") != "final"
    if turn["tool_calls"]:
        return False
    if part.kind == "thinking":
        return not turn["content"] and turn["thinking"] is None
    return not turn["content"] or part.kind == turn.get("kind") == "text"


def read_row_tools(row: Row, findings: Findings) -> list[Row]:
    """The functions in `tools`, or in OpenAI's earlier `functions`."""
    name = "tools" if not is_absent(row.get("tools")) and row["tools"] != [] else "functions"
    return read_tools(row.get(name), findings, where=name)
