"""The functions that a row offers to the model, from the forms in which datasets keep them."""

import re
from typing import Any

from finetune.data.findings import Findings
from finetune.data.shapes import TOOL_COLUMNS
from finetune.data.values import (
    Row,
    depth_of,
    is_absent,
    is_hollow,
    is_nothing,
    is_unicode,
    json_text,
    parse_json,
    rows_of_columns,
    type_in_words,
    value_of,
)

# A schema nested deeper is no mistake that a user wants rendered, and would exhaust Python's stack.
MAX_DEPTH = 64
PARAMETERS = (
    "parameters",
    "input_schema",
    "inputSchema",
    "parametersJsonSchema",
    "parameters_json_schema",
    "schema",
    "arguments",
    "args",
    "params",
)
DECLARATIONS = ("functionDeclarations", "function_declarations")  # Gemini's
TOOL_KEYS = {"type", "function", "name", "description", "strict", *PARAMETERS}
# Python's names of types, which some datasets use for JSON schema's.
PYTHON_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "dict": "object",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "sequence": "array",
    "any": "any",
}
JSON_TYPES = ("string", "number", "integer", "boolean", "object", "array", "null")
# JSON schema's keywords for lists, which a parameter may have as its name.
LIST_KEYWORDS = ("required", "enum", "oneOf", "anyOf", "allOf")
# Keywords that say nothing of the parameters, and of whose objects none is a parameter.
SIDE_KEYWORDS = ("$defs", "definitions", "additionalProperties", "patternProperties", "$schema")


def function_of(call: Any) -> Row:
    """The function of a tool or of a tool call; empty if there is none.

    OpenAI's objects keep it under `function`. In other datasets the object itself is the function.
    """
    if not isinstance(call, dict):
        return {}
    function = parse_json(call.get("function"))
    return function if isinstance(function, dict) else {} if is_text(function) else call


def is_text(value: Any) -> bool:
    return isinstance(value, str) and not is_absent(value)


def read_row_tools(row: Row, messages: list[Row], findings: Findings) -> list[Row]:
    """The functions that a row offers: in a column, or in one of its messages.

    Lists in several places must be equal: nobody can tell which one the model saw.
    """
    given = [(name, row.get(name)) for name in TOOL_COLUMNS]
    arguments = parse_json(row.get("chat_template_kwargs"))
    if isinstance(arguments, dict):
        given.append(("chat_template_kwargs.xml_tools", arguments.get("xml_tools")))
    for number, message in enumerate(messages):
        given += [(f"messages[{number}].{n}", message.get(n)) for n in ("tools", "functions")]
        for part in message["content"] if isinstance(message.get("content"), list) else []:
            if isinstance(part, dict) and part.get("type") == "developer_content":
                given.append((f"messages[{number}].content", harmony_tools(part)))
    given = [(where, value) for where, value in given if not is_nothing(value)]
    read = [
        (where, each_once(read_tools(value, findings, where=where), where, findings))
        for where, value in given
    ]
    for where, tools in read[1:]:
        if tools != read[0][1]:
            findings.problems.append(f"`{read[0][0]}` and `{where}` offer different functions")
    return read[0][1] if read else []


def each_once(tools: list[Row], where: str, findings: Findings) -> list[Row]:
    """The functions without those that stand there twice. Two of one name must be equal."""
    by_name: dict[str, Row] = {}
    for tool in tools:
        earlier = by_name.setdefault(tool["name"], tool)
        if earlier is tool or not tool["name"]:
            continue
        if earlier == tool:
            findings.notes.append(f"a function that stands twice in `{where}` offered once")
        else:
            findings.problems.append(f"`{where}` has two different functions {tool['name']!r}")
    return list(by_name.values())


def harmony_tools(part: Row) -> Any:
    """The functions in openai-harmony's own developer message."""
    namespaces = part.get("tools")
    functions = namespaces.get("functions") if isinstance(namespaces, dict) else None
    return functions.get("tools") if isinstance(functions, dict) else None


def read_tools(value: Any, findings: Findings, *, where: str = "tools") -> list[Row]:
    """Each with `name`, `description` and `parameters`. The value may be JSON in a text."""
    if is_nothing(value):
        return []
    tools = rows_of_columns(parse_json(value))
    if isinstance(tools, dict):
        tools = tools_of_object(tools)
    if not isinstance(tools, list):
        what = "text that is not JSON" if isinstance(tools, str) else type_in_words(tools)
        findings.problems.append(f"`{where}` is {what}, not a list of functions")
        return []
    read: list[Row] = []
    for number, tool in enumerate(tools):
        tool = parse_json(tool)
        if tool is None or is_hollow(tool):
            continue
        if not isinstance(tool, dict):
            what = type_in_words(tool)
            findings.problems.append(f"{where}[{number}] is {what}, not an object with a `name`")
            continue
        declared = next((tool[k] for k in DECLARATIONS if isinstance(tool.get(k), list)), None)
        if declared is not None:
            read += read_tools(declared, findings, where=f"{where}[{number}]")
        else:
            read.append(read_tool(tool, f"{where}[{number}]", findings))
    return read


def tools_of_object(tools: Row) -> Any:
    """A single function, or functions by their names, as a list. Else the object as it is."""
    if isinstance(function_of(tools).get("name"), str) or tools.keys() & {*DECLARATIONS}:
        return [tools]
    if all(isinstance(tool, dict) for tool in tools.values()) and not tools.keys() & TOOL_KEYS:
        return [{"name": name, **tool} for name, tool in tools.items()]
    return tools


def read_tool(tool: Any, where: str, findings: Findings) -> Row:
    function = function_of(tool)
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or is_absent(name):
        kind = tool.get("type") if isinstance(tool, dict) else None
        what = f": only functions are rendered, not {kind!r}" if kind != "function" and kind else ""
        findings.problems.append(f"{where} has no `name`{what}")
        return {"name": "", "description": "", "parameters": None}
    name = name.strip().removeprefix("functions.")  # as read_call has it
    check_name(name, where, findings)
    if not is_absent(description) and not isinstance(description, str):
        findings.problems.append(
            f"{where} has {type_in_words(description)} as `description`, not text"
        )
    for owner in (tool, function):
        findings.unread.update(
            f"tools[].{key}" for key in owner.keys() - TOOL_KEYS if owner[key] is not None
        )
    given = [parse_json(function[key]) for key in PARAMETERS if not is_nothing(function.get(key))]
    if any(other != given[0] for other in given[1:]):
        keys = [key for key in PARAMETERS if not is_nothing(function.get(key))]
        findings.problems.append(f"{where} has different schemas in {' and '.join(keys)}")
    parameters = given[0] if given else parse_json(value_of(function, *PARAMETERS))
    if isinstance(parameters, dict) and isinstance(parameters.get("properties"), list):
        findings.problems.append(f"{where} has a list as `properties`, not an object by names")
    if parameters is not None and not isinstance(parameters, dict):
        what = type_in_words(parameters)
        findings.problems.append(f"{where} has {what} as `parameters`, not a JSON schema")
        parameters = None
    if depth_of(parameters, limit=2 * MAX_DEPTH) > 2 * MAX_DEPTH:
        findings.problems.append(f"{where} has `parameters` nested deeper than {MAX_DEPTH} levels")
        parameters = None
    description = description if is_text(description) else ""
    read = {
        "name": name,
        "description": description,
        "parameters": read_schema(parameters),
    }
    check_parameters(read["parameters"], where, findings)
    try:
        if not is_unicode(json_text(read)):
            findings.problems.append(f"{where} has half a surrogate pair: not valid Unicode")
    except ValueError as error:
        findings.problems.append(f"{where} has `parameters` that {error}")
    return read


def check_parameters(schema: Any, where: str, findings: Findings) -> None:
    """Warn of an object in which nothing says what the parameters are."""
    named = {"type", "properties", "$ref", "items", *LIST_KEYWORDS, *SIDE_KEYWORDS}
    if schema and not schema.keys() & named and not schema.keys() <= {"title", "description"}:
        keys = ", ".join(f"`{key}`" for key in schema)
        findings.warnings.append(
            f"{where} has `parameters` with {keys}, which is no JSON schema: rendered as `any`"
        )


def check_name(name: str, where: str, findings: Findings) -> None:
    """Warn of a name with a space in it: servers read the name of a call up to there."""
    if re.search(r"\s", name.strip()):
        findings.warnings.append(f"{where} has a space in the name {name!r}: a server reads half")


def read_schema(parameters: Row | None) -> Any:
    """A JSON schema without the nulls that exporters add, and with JSON schema's names of types.

    Some datasets have `{"city": {"type": "str"}}` for an object with these properties.
    """
    if parameters is None:
        return None
    fields = {k: v for k, v in parameters.items() if v is not None and not is_hollow(v)}
    if are_properties(fields):
        given = {name: schema_of_property(value) for name, value in fields.items()}
        properties = {name: clean_schema(value) for name, value in given.items()}
        return {"type": "object", "properties": properties, "required": required_of(given)}
    return clean_schema(parameters)


def are_properties(fields: Row) -> bool:
    """Whether an object is no schema but holds parameters by their names.

    A parameter may well be called `type`, `items` or `required`: what stands under it decides.
    """
    if not fields or any(is_keyword(name, value) for name, value in fields.items()):
        return False
    return all(isinstance(value, dict) or is_type_name(value) for value in fields.values())


def is_keyword(name: str, value: Any) -> bool:
    """Whether a key of `parameters` is JSON schema's, and not the name of a parameter."""
    if name == "type":
        return isinstance(value, str | list)
    if name == "properties":  # as a parameter's name it has a text as its own `type`
        return isinstance(value, dict) and not isinstance(value.get("type"), str)
    return (
        (name in LIST_KEYWORDS and isinstance(value, list))
        or (name == "$ref" and isinstance(value, str))
        or name in SIDE_KEYWORDS
    )


def is_type_name(value: Any) -> bool:
    """Whether a text is the name of a type, in JSON schema's words or in Python's."""
    return isinstance(value, str) and type_of_name(value)["type"] in (*JSON_TYPES, "any")


def schema_of_property(value: Any) -> Any:
    """The schema of a parameter, of which some datasets write the type alone."""
    return {"type": value} if is_type_name(value) else value


def required_of(properties: dict[str, Row]) -> list[str]:
    """The parameters that a call must have, by the marks of each: all that are not optional."""
    marked = [name for name, value in properties.items() if value.get("required") is True]
    return marked or [
        name
        for name, value in properties.items()
        if not is_optional(value.get("type"))
        and "default" not in value
        and value.get("required") is not False
        and value.get("optional") is not True
    ]


def is_optional(kind: Any) -> bool:
    """Whether a name of a type says that the parameter may be left out, as Python writes it."""
    if not isinstance(kind, str):
        return False
    return "optional" in kind.lower() or re.search(r"\bNone\b", kind) is not None


def clean_schema(schema: Any) -> Any:
    if isinstance(schema, list):
        return [clean_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key in ("default", "const", "example"):
            if value is not None or allows_null(schema):
                kept[key] = value
        elif value is not None:
            # `properties` may have a property that is called "default" or "type".
            kept[key] = (
                {
                    name: clean_schema(schema_of_property(item))
                    for name, item in value.items()
                    if item is not None and not is_hollow(item)
                }
                if key == "properties" and isinstance(value, dict)
                else clean_schema(value)
            )
    properties = kept.get("properties")
    if isinstance(properties, dict) and not isinstance(kept.get("required"), list):
        # JSON schema's draft 3 marks each property.
        names = [
            n for n, v in properties.items() if isinstance(v, dict) and v.get("required") is True
        ]
        kept |= {"required": names} if names else {}
    if isinstance(kept.get("type"), str):
        named = type_of_name(kept["type"])
        kept |= {key: value for key, value in named.items() if key == "type" or key not in kept}
    return kept


def type_of_name(name: str) -> Row:
    """JSON schema's type for a name: Python's `List[int], optional`, Gemini's `STRING`."""
    bare = re.sub(r",\s*optional.*$", "", name.strip())
    if match := re.fullmatch(r"(?:typing\.)?Optional\[(.+)\]", bare):
        return type_of_name(match[1])
    union = r"(?:typing\.)?Union\[([^,]+),\s*None\]|([^|]+)\|\s*None"
    if match := re.fullmatch(union, bare):
        return type_of_name(match[1] or match[2])
    if match := re.fullmatch(r"(?:typing\.)?(\w+)\[(.+)\]", bare):
        kind = PYTHON_TYPES.get(match[1].lower())
        if kind == "array" and "," not in match[2]:
            return {"type": "array", "items": type_of_name(match[2])}
        return {"type": kind or name}
    lower = bare.lower()
    if bare == lower or bare.isupper() or bare in ("List", "Dict", "Tuple", "Set"):
        return {"type": PYTHON_TYPES.get(lower, lower if lower in JSON_TYPES else bare)}
    return {"type": bare}


def allows_null(schema: Any) -> bool:
    """Whether a JSON schema allows null."""
    if not isinstance(schema, dict):
        return False
    kind, values = schema.get("type"), schema.get("enum")
    variants = [v for key in ("anyOf", "oneOf") for v in schema.get(key) or [] if key in schema]
    return (
        schema.get("nullable") is True
        or kind == "null"
        or (isinstance(kind, list) and "null" in kind)
        or (isinstance(values, list) and None in values)
        or any(allows_null(variant) for variant in variants)
    )


def without_added_nulls(arguments: Any, schema: Any) -> Any:
    """The arguments of a call without the nulls that no author wrote, at every level.

    Exporters of tables give each object the keys of all others, as nulls. A null is kept where the
    function's schema allows it. Items of lists stay.
    """
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(arguments, list):
        return [without_added_nulls(item, schema.get("items")) for item in arguments]
    if not isinstance(arguments, dict):
        return arguments
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    return {
        name: without_added_nulls(value, properties.get(name))
        for name, value in arguments.items()
        if value is not None or allows_null(properties.get(name))
    }
