"""What looks like a call in the text of an answer, without the tags that would make it one.

Nothing is read here, since an answer may well be JSON or a line of Python: its row is warned of.
"""

import re
from collections.abc import Collection
from typing import Any

from finetune.data.values import parse_json

# The keys of a call that stands in a text as JSON, without any tag. Those of CLEAR_ARGUMENTS make
# one of it whatever it calls, the others if `tools` offers what it calls.
CLEAR_ARGUMENTS = ("arguments", "parameters")
ARGUMENTS = (*CLEAR_ARGUMENTS, "args", "input", "action_input")
NAMES = ("name", "function", "action")
CALL_KEYS = {"id", "call_id", "index", "type", *NAMES, *ARGUMENTS}
FENCED = re.compile(r"\A```\w*\s*\n(?P<inner>.*?)\n?```\Z", re.DOTALL)
# ToolACE's calls, whose names may have spaces, and calls as Python writes them.
LISTED_CALL = re.compile(r"\A\[(?P<name>\w[\w .:/-]*)\((?P<arguments>.*)\)\]\Z", re.DOTALL)
PYTHON_CALL = re.compile(r"\A(?P<name>[\w.-]+)\(.*\)\Z", re.DOTALL)
NAMED = re.compile(r'"(?:name|function|action)"\s*:\s*"([^"\n]{1,100})"')


def call_in_text(text: str, offered: Collection[str]) -> str | None:
    """What looks like a call in an answer, in the words of a warning; None if nothing does.

    Llama 3.1's models write calls as bare JSON, ToolACE's as `[name(a=1)]`, others as a block of
    code. They are no calls here: an answer may well be such a text. offered: what `tools` names.
    """
    bare = text.strip()
    if match := FENCED.match(bare):
        bare = match["inner"].strip()
    if bare.startswith(("{", "[")):
        try:
            name = name_of_call(parse_json(bare), offered)
        except RecursionError:
            name = None
        if name is not None:
            return f'{{"name": "{name}", ...'
    if match := LISTED_CALL.match(bare):
        arguments = match["arguments"]
        if match["name"] in offered or not arguments or re.match(r"\s*\w+\s*=", arguments):
            return f"[{match['name']}("
    if not offered:
        return None
    if (match := PYTHON_CALL.match(bare)) and match["name"] in offered:
        return f"{match['name']}("
    if not any(f'"{key}"' in text for key in ARGUMENTS):
        return None
    name = next((name for name in NAMED.findall(text) if name in offered), None)
    return name and f'"name": "{name}"'


def name_of_call(value: Any, offered: Collection[str]) -> str | None:
    """The name that a value calls, if it has the form of a call, or of calls alone; else None."""
    if isinstance(value, dict) and isinstance(value.get("tool_calls"), list):
        value = value["tool_calls"]
    if isinstance(value, list):
        names = [name_of_call(item, offered) for item in value]
        return names[0] if names and None not in names else None
    if not isinstance(value, dict) or not value.keys() <= CALL_KEYS:
        return None
    if isinstance(value.get("function"), dict):
        return name_of_call(value["function"], offered)
    name = next((value[key] for key in NAMES if isinstance(value.get(key), str)), None)
    is_clear = any(isinstance(value.get(key), dict | str) for key in CLEAR_ARGUMENTS)
    is_call = is_clear or (name in offered and any(key in value for key in ARGUMENTS))
    return name if is_call else None
