"""Calls of functions, from the forms in which datasets keep them, and their results."""

import json
from typing import Any, NoReturn

from finetune.data.findings import Findings
from finetune.data.json_rows import unique_keys
from finetune.data.tools import check_name, function_of, without_added_nulls
from finetune.data.values import (
    Row,
    is_absent,
    is_unicode,
    json_text,
    parse_json,
    type_in_words,
    value_of,
    without_nulls,
)

ARGUMENTS = ("arguments", "parameters", "args", "input")
CALL_KEYS = {"id", "call_id", "type", "function", "index", "name", *ARGUMENTS}
CALL_TYPES = ("function", "tool_use", "function_call", "tool_call")
NULLS = ("null", "None", "nan", "NaN")


def json_of_calls(value: Any, where: str, findings: Findings) -> Any:
    """The calls that a text of JSON holds, as parse_json reads it; any other value as it is."""
    if isinstance(value, str):
        try:
            json.loads(value, object_pairs_hook=unique_keys)
        except (json.JSONDecodeError, RecursionError):
            pass  # read_call says that it is no call
        except ValueError as error:
            findings.problems.append(f"{where} has a call in which {error}")
    return parse_json(value)


def are_equal_calls(calls: list[Any], others: list[Any]) -> bool:
    """Whether two lists of calls are of the same functions with the same arguments."""
    return [meaning_of(call) for call in calls] == [meaning_of(call) for call in others]


def meaning_of(call: Any) -> tuple[str, Any]:
    """The name and the arguments of a call in any of its forms."""
    function = function_of(call)
    arguments = value_of(function, *ARGUMENTS)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = arguments.strip()
    name = str(function.get("name")).strip().removeprefix("functions.")
    return name, without_nulls(arguments or {})  # of which an exporter may have added some to one


def read_call(
    call: Any,
    where: str,
    schemas: dict[str, Any],
    findings: Findings,
    *,
    is_text: bool = False,
    has_added_nulls: bool = True,
) -> Row:
    """`name`, `arguments` as JSON text, and `id`, or None if the call has none.

    schemas: the parameters of each function of the row. is_text: the call stood in a text, so that
    its author wrote each null. has_added_nulls: an exporter may have added some otherwise.
    """
    function = function_of(call)
    name = function.get("name")
    if not isinstance(name, str) or is_absent(name):
        findings.problems.append(f"{where} has no function `name`")
        return {"name": "", "arguments": "{}", "id": None}
    name = name.strip().removeprefix("functions.")
    check_name(name, where, findings)
    call_id = value_of(call, "id", "call_id")
    if isinstance(call_id, list | dict):
        findings.problems.append(f"{where} has {type_in_words(call_id)} as `id`, not text")
        call_id = None
    findings.unread.update(
        f"tool_calls[].{key}" for key in call.keys() - CALL_KEYS if call[key] is not None
    )
    arguments = value_of(function, *ARGUMENTS)
    if isinstance(arguments, dict) and not is_text and not isinstance(call.get("function"), str):
        arguments = authors_arguments(arguments, schemas.get(name), has_added_nulls, findings)
    text = arguments_text(arguments, where, findings)
    if not is_unicode(name + text):
        findings.problems.append(f"{where} has half a surrogate pair: not valid Unicode")
    return {"name": name, "arguments": text, "id": call_id}


def authors_arguments(
    arguments: Row, schema: Any, has_added_nulls: bool, findings: Findings
) -> Row:
    """The arguments without the nulls that an exporter has added, and without pandas' NaN."""
    without_nan = {k: None if v != v else v for k, v in arguments.items()}
    if has_added_nulls or any(v != v for v in arguments.values()):
        kept: Row = without_added_nulls(without_nan, schema)
        if kept != without_nan:
            findings.notes.append("nulls in `arguments` left out, as a table's exporter adds them")
        return kept
    return arguments


def arguments_text(arguments: Any, where: str, findings: Findings) -> str:
    """The JSON of a call's arguments. Text that is JSON already stays as it is."""
    if arguments is None:
        return "{}"
    if isinstance(arguments, dict | list):
        try:
            return json_text(arguments)
        except ValueError as error:
            findings.problems.append(f"{where} has `arguments` that {error}")
            return "{}"
    if isinstance(arguments, str) and arguments.strip() in NULLS:
        findings.notes.append("`arguments` that are null, as text, read as {}")
        return "{}"
    problem = "are neither object nor text"
    if isinstance(arguments, str):
        try:
            return checked_text(arguments)
        except ValueError as error:
            problem = str(error)
        except RecursionError:
            problem = "are nested too deep"
    findings.problems.append(f"{where} has `arguments` that {problem}")
    return "{}"


def checked_text(text: str) -> str:
    """A text that is the JSON of a call's arguments. Raises ValueError if it is not.

    What an object could not hold is refused in a text too: it would be learnt as it stands.
    """
    try:
        value = strict_json(text)
        if isinstance(value, str):
            text, value = value, strict_json(value)  # JSON that was written as JSON once more
    except json.JSONDecodeError:
        raise ValueError(f"are not JSON: {text[:40]!r}") from None
    except ValueError as error:
        raise ValueError(f"are not valid: {error}") from None
    if not isinstance(value, dict | list):
        raise ValueError(f"are {type_in_words(value)}, not an object: {text[:40]!r}")
    if not is_unicode(json_text(value)):
        raise ValueError("spell half a surrogate pair: not valid Unicode")
    return text


def strict_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for NaN, and for a key that appears twice."""
    return json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def take_answered(result: Row, unanswered: list[Row], later: set[str]) -> str:
    """The name of the function whose result this is. The call is taken out of `unanswered`.

    result: `id` and `name`, each None if it has none. The id decides. Where calls repeat an id, or
    there is none, the result's own name decides, and then the order of the calls. later: the ids
    of the results behind this one, which are left to them as long as there are other calls.
    """
    own_name = result["name"]
    same_id = [call for call in unanswered if result["id"] is not None]
    same_id = [call for call in same_id if str(call["id"]) == str(result["id"])]
    if len(same_id) == 1:
        name = str(same_id[0]["name"])
        call = same_id[0]
    else:
        free = [call for call in unanswered if str(call["id"]) not in later]
        calls = same_id or free or unanswered
        named = [call for call in calls if call["name"] == own_name]
        call = (named or calls)[0]
        name = str(own_name or call["name"])
    unanswered[:] = [other for other in unanswered if other is not call]
    return name
