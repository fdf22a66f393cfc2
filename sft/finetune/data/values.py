"""What a single value means: absent or not, text, JSON inside text, JSON instead of text."""

import ast
import json
import re
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

Row = dict[str, Any]
PRINTED_BY_PYTHON = re.compile(r"\s*[\[{]\s*[\[{]*\s*'")


def value_of(fields: Mapping[str, Any], *names: str) -> Any:
    """The first value under one of the names that is not absent; None if all are."""
    for name in names:
        value = fields.get(name)
        if value is not None and not is_absent(value):
            return value
    return None


def is_absent(value: Any) -> bool:
    """Whether a value stands for a missing one: null, blank text, or the NaN that pandas writes."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or (isinstance(value, float) and value != value)


def is_hollow(value: Any) -> bool:
    """Whether a value is an object in which everything is null: exporters write it for none."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(item is None or is_hollow(item) for item in value.values())
    )


def is_nothing(value: Any) -> bool:
    """Whether a column that may hold objects holds none, also as `None` or `null` in a text."""
    return (
        is_absent(value)
        or value in ([], {}, "None", "null", "nan", "NaN", "[]", "{}")
        or is_hollow(value)
    )


def json_text(value: Any) -> str:
    """The one way in which a value is written as JSON. Raises ValueError if it cannot be."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, default=json_of_arrow_value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be written as JSON ({error})") from error


def json_of_arrow_value(value: Any) -> Any:
    """Dates and decimals, which tables have and JSON has not. Raises TypeError for other types."""
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError(f"a {type(value).__name__} is no JSON value")


def parse_json(value: Any) -> Any:
    """The list or object that a text of JSON holds. Any other value is returned as it is.

    A table that was written as CSV holds what Python prints for them, with single quotes.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return python_literal(value)
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    """An object's keys and values. Raises ValueError for a key that appears twice.

    json would keep the last of them without a word, and so lose what a user wrote.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return row


def python_literal(text: str) -> Any:
    """The list or object that Python has printed with single quotes, or the text as it is."""
    if not PRINTED_BY_PYTHON.match(text):
        return text
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def rows_of_columns(value: Any) -> Any:
    """A list of objects, of an object of equally long lists: the form in which tables keep it.

    Any other value is returned as it is.
    """
    if not isinstance(value, dict) or not value:
        return value
    lists = list(value.values())
    if not all(isinstance(item, list) for item in lists) or len({len(x) for x in lists}) != 1:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*lists, strict=True)]


def is_from_table(messages: list[Any]) -> bool:
    """Whether an exporter has given each message the keys of all others, as nulls."""
    objects = [message for message in messages if isinstance(message, dict)]
    keys = {frozenset(message) for message in objects}
    return len(objects) > 1 and len(keys) == 1 and any(None in m.values() for m in objects)


def without_nulls(value: Any) -> Any:
    """The value without its null keys, at every level."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded. JSON can spell half a surrogate pair (`\\ud800`), and
    surrogateescape puts one for each byte that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def depth_of(value: Any, *, limit: int) -> int:
    """How deep lists and objects are nested in a value, counted up to `limit` + 1."""
    depth, level = 0, [value]
    while level and depth <= limit:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = inner
        depth += bool(level)
    return depth


def type_in_words(value: Any) -> str:
    """The type of a JSON value as the writer of the JSON would call it, for example "a list"."""
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    names[str] = "text"
    if type(value) in (int, float):
        return f"the number {value}"
    return names.get(type(value), f"a {type(value).__name__}")
