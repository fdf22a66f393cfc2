"""The content of a message: text, or a list of typed parts."""

from typing import Any

from finetune.data.values import Row, is_absent, type_in_words

TEXT_TYPES = ("text", "input_text", "output_text", "reasoning_text", "summary_text")
CONTENT_KEYS = ("content", "value", "parts", "output", "text", "message")


def content_of(message: Row) -> Any:
    name = content_key(message)
    content = None if name is None else message[name]
    if isinstance(content, dict) and name == "parts":
        content = [content]
    if content is None and not is_absent(message.get("refusal")):
        return message["refusal"]
    return None if isinstance(content, float) and is_absent(content) else content


def content_key(message: Row) -> str | None:
    """The first of CONTENT_KEYS that is not blank, or else not null; None if all are."""
    given = [name for name in CONTENT_KEYS if message.get(name) is not None]
    return next((name for name in given if not is_absent(message[name])), next(iter(given), None))


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


def content_in_words(content: Any) -> str:
    if isinstance(content, list):
        kinds = [p.get("type") for p in content if isinstance(p, dict) and not is_text_part(p)]
        if kinds and kinds[0]:
            return f"a part of type {kinds[0]!r}"
        keys = [key for p in content if isinstance(p, dict) and not is_text_part(p) for key in p]
        if keys:
            return f"a part with `{keys[0]}`"
    return type_in_words(content)
