"""What the assistant writes in a message of any known form: parts in order, and turns of them."""

from contextlib import suppress
from typing import Any

from finetune.data.calls import CALL_TYPES, are_equal_calls, json_of_calls, read_call
from finetune.data.content import content_in_words, content_of, is_text_part, text_of_parts
from finetune.data.findings import Findings
from finetune.data.markup import Part, Unclear, read_markup, without_thinking_tags
from finetune.data.shapes import ROLE_KEYS, THINKING_FIELDS
from finetune.data.values import (
    Row,
    is_absent,
    is_hollow,
    is_nothing,
    json_text,
    rows_of_columns,
    type_in_words,
    value_of,
)

# A message's own names for its thinking; a row has columns of its own called `analysis`.
THINKING_KEYS = (
    *THINKING_FIELDS,
    "thought",
    "thoughts",
    "think",
    "analysis",
    "reasoning_details",
    "reasoning_text",
    "chain_of_thought",
    "cot",
    "rationale",
)
# LangChain's and AM's objects beside the content. AM's content mostly has the thought too.
NESTED_THINKING = (("additional_kwargs", "reasoning_content"), ("info", "think_content"))
CALLING_ROLES = ("function_call", "tool_call")
TWICE = "calls that stand in two places read once"
CHANNELS = {"analysis": "thinking", "commentary": "preamble", "final": "final"}


def assistant_parts(message: Row, where: str, findings: Findings) -> list[Part]:
    """What the assistant writes in a message, in order."""
    content = content_of(message)
    thoughts = own_thoughts(message, where, findings)
    parts = [Part("thinking", thought) for thought in thoughts[:1]]
    role = str(value_of(message, *ROLE_KEYS)).strip().lower()
    if message.get("type") == "function_call":
        return [*parts, Part("call", message)]
    if message.get("type") == "reasoning":  # an item of OpenAI's Responses API
        part = typed_part(message)
        return parts if part is None or is_absent(part.value) else [*parts, part]
    if role in CALLING_ROLES:
        return beside(parts, called_parts(content, where, findings), where, findings)
    recipient = value_of(message, "recipient")
    if value_of(message, "channel") or recipient not in (None, "all"):
        return parts + native_parts(message, content, where, findings)
    inside = [bare_part(p, findings) for p in content_parts(message, content, where, findings)]
    if not any(part.kind == "thinking" for part in [*parts, *inside]):
        parts = nested_thoughts(message, where, findings)
    parts = beside(parts, inside, where, findings)
    return with_calls(parts, call_parts(message, where, findings), where, findings)


def beside(own: list[Part], inside: list[Part], where: str, findings: Findings) -> list[Part]:
    """The parts of the content behind the thought of another key, which may be in both places.

    own: one thought, or none.
    """
    texts = [part.value.strip() for part in inside if part.kind == "thinking"]
    texts = [text for text in texts if text]
    if not own or not texts:
        return own + inside
    # A list of parts may have in pieces what the other key has at once.
    if "".join(own[0].value.split()) != "".join("".join(texts).split()):
        findings.problems.append(f"{where} has thinking beside its `content` and inside it")
    return inside


def with_calls(parts: list[Part], own: list[Part], where: str, findings: Findings) -> list[Part]:
    """The parts of the content, and the message's own calls, which may be in both places."""
    inside = [part for part in parts if part.kind == "call"]
    if not own or not inside:
        return parts + own
    if not are_equal_calls([part.value for part in inside], [part.value for part in own]):
        findings.problems.append(f"{where} has calls in its `content` and different ones beside it")
    findings.notes.append(TWICE)
    return [part for part in parts if part.kind != "call"] + own


def called_parts(content: Any, where: str, findings: Findings) -> list[Part]:
    """The content of ShareGPT's `function_call`: calls as JSON, maybe behind thinking in tags."""
    text = text_of_parts(content) if content else None
    content = content if text is None else text
    parts = [Part("text", content)]
    if isinstance(content, str) and not content.lstrip().startswith(("[", "{")):
        with suppress(Unclear):  # what is no call is named below
            parts = (read_markup(content) or (parts, []))[0]
    found: list[Part] = []
    for part in parts:
        if part.kind in ("thinking", "call"):
            found.append(part)
            continue
        calls = json_of_calls(part.value, where, findings)
        if not isinstance(calls, dict | list):
            what = repr(calls[:40]) if isinstance(calls, str) else type_in_words(calls)
            findings.problems.append(
                f"{where} has a call that is not JSON with a `name` and `arguments`: {what}"
            )
            continue
        is_text = isinstance(part.value, str)
        calls = calls if isinstance(calls, list) else [calls]
        found += [Part("call", call, is_text) for call in calls]
    return found


def own_thoughts(message: Row, where: str, findings: Findings) -> list[str]:
    """The different texts under the names in THINKING_KEYS: one, or it is a problem."""
    thoughts: list[str] = []
    for key in THINKING_KEYS:
        value = message.get(key)
        if is_nothing(value):
            continue
        text = text_of_thoughts(value)
        if text is None:
            findings.problems.append(f"{where} has {type_in_words(value)} as `{key}`, not text")
        elif not is_absent(text) and (bare := bare_thought(text, findings)) not in thoughts:
            thoughts.append(bare)
    if len({thought.strip() for thought in thoughts}) > 1:
        findings.problems.append(f"{where} has two different thoughts beside its `content`")
    return [thought for thought in thoughts if not is_absent(thought)]


def nested_thoughts(message: Row, where: str, findings: Findings) -> list[Part]:
    """The thought in an object beside the content, as LangChain and AM's datasets keep it."""
    for outer, inner in NESTED_THINKING:
        holder = message.get(outer)
        value = holder.get(inner) if isinstance(holder, dict) else None
        if is_nothing(value):
            continue
        if not isinstance(value, str):
            what = type_in_words(value)
            findings.problems.append(f"{where} has {what} as `{outer}.{inner}`, not text")
            continue
        findings.notes.append(f"`{outer}.{inner}` read as thinking")
        return [Part("thinking", bare_thought(value, findings))]
    return []


def bare_part(part: Part, findings: Findings) -> Part:
    if part.kind != "thinking":
        return part
    return part._replace(value=bare_thought(part.value, findings))


def bare_thought(text: str, findings: Findings) -> str:
    """A thought without the tags that its dataset has left around it."""
    bare, found = without_thinking_tags(text)
    findings.notes += found
    return bare


def text_of_thoughts(value: Any) -> str | None:
    """Thinking as text: also OpenRouter's list of `reasoning.text` and `reasoning.summary`."""
    if not isinstance(value, list):
        return text_of_parts(value)
    found = [part.get("text", part.get("summary")) for part in value if isinstance(part, dict)]
    texts = [text for text in found if isinstance(text, str)]
    return "".join(texts) if len(texts) == len(value) else None


def call_parts(message: Row, where: str, findings: Findings) -> list[Part]:
    """The calls beside the content, in today's form or in OpenAI's earlier one."""
    given = message.get("tool_calls")
    calls = [] if is_nothing(given) else rows_of_columns(json_of_calls(given, where, findings))
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        what = type_in_words(calls)
        findings.problems.append(f"{where} has {what} as `tool_calls`, not a list")
        calls = []
    is_text = isinstance(given, str)
    parts = [
        Part("call", json_of_calls(call, where, findings), is_text or isinstance(call, str))
        for call in calls
    ]
    parts = [part for part in parts if part.value is not None and not is_hollow(part.value)]
    earlier = message.get("function_call")
    if is_nothing(earlier):
        return parts
    value = json_of_calls(earlier, where, findings)
    legacy = Part("call", value, isinstance(earlier, str))
    if not parts or is_nothing(legacy.value):
        return parts if is_nothing(legacy.value) else [legacy]
    if not are_equal_calls([legacy.value], [part.value for part in parts]):
        findings.problems.append(f"{where} has a `function_call` and different `tool_calls`")
    findings.notes.append(TWICE)
    return parts


def native_parts(message: Row, content: Any, where: str, findings: Findings) -> list[Part]:
    """A message of harmony: its channel and its recipient say what it is."""
    channel, recipient = str(message.get("channel")).lower(), value_of(message, "recipient")
    text = text_of_parts(content)
    if text is None:
        findings.problems.append(f"{where} has {type_in_words(content)} as `content`, not text")
        return []
    if recipient not in (None, "all"):
        if str(recipient).startswith("functions."):
            return [Part("call", {"name": str(recipient), "arguments": text})]
        findings.problems.append(
            f"{where} has the recipient {recipient!r}: only calls of functions are rendered"
        )
        return []
    if channel not in CHANNELS:
        known = ", ".join(CHANNELS)
        findings.problems.append(f"{where} has the channel {channel!r}, not one of {known}")
        return []
    return [Part(CHANNELS[channel], text), *call_parts(message, where, findings)]


def content_parts(message: Row, content: Any, where: str, findings: Findings) -> list[Part]:
    """The parts of an assistant's content: text, maybe with markup, or a list of typed parts."""
    if content is None:
        return []
    text = text_of_parts(content)
    if text is None and isinstance(content, list):
        typed = [typed_part(part) for part in content]
        known = [part for part in typed if part is not None]
        if len(known) == len(typed):
            return known
    if text is None:
        # A column of its own holds the answer, whatever it is: text, a number, an object.
        is_typed = any(isinstance(part, dict) and part.get("type") for part in as_list(content))
        if message.get("is_column") and not (is_typed or isinstance(content, bool)):
            return json_part(content, where, findings)
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


def as_list(content: Any) -> list[Any]:
    return content if isinstance(content, list) else []


def json_part(content: Any, where: str, findings: Findings) -> list[Part]:
    try:
        return [Part("text", json_text(content))]
    except ValueError as error:
        findings.problems.append(f"{where} {error}")
        return []


def typed_part(part: Any) -> Part | None:
    """A part of a list of parts, as OpenAI, Anthropic and Google write them; None if unknown."""
    if not isinstance(part, dict):
        return None
    kind, text = part.get("type"), part.get("text")
    call = part.get("functionCall", part.get("function_call"))
    if isinstance(call, dict):
        return Part("call", call)
    if kind in CALL_TYPES:
        return Part("call", part)
    if kind in ("reasoning", "thinking", "thought") or part.get("thought") is True:
        names = ("thinking", "reasoning", "text", "content", "summary")
        inner = next((part[name] for name in names if part.get(name)), "")
        thinking = text_of_parts(inner)
        return None if thinking is None else Part("thinking", thinking)
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return Part("text", part["refusal"])
    return Part("text", text) if is_text_part(part) else None


def turns_of(
    parts: list[Part],
    where: str,
    schemas: dict[str, Any],
    findings: Findings,
    *,
    has_added_nulls: bool = False,
) -> list[Row]:
    """The parts as turns: each with thinking, then text, then calls, as far as it has them.

    has_added_nulls: an exporter may have added nulls to the arguments that are objects.
    """
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
            call = read_call(
                part.value,
                f"{where}.tool_calls[{number}]",
                schemas,
                findings,
                is_text=part.is_text,
                has_added_nulls=has_added_nulls,
            )
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
