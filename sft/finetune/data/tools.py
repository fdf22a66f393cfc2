"""The functions that a row offers to the model, from the forms in which datasets keep them."""

from typing import Any

from finetune.data.findings import Findings
from finetune.data.values import (
    Row,
    depth_of,
    is_absent,
    is_unicode,
    json_text,
    parse_json,
    rows_of_columns,
    type_in_words,
    value_of,
)

# A schema nested deeper is no mistake that a user wants rendered, and would exhaust Python's stack.
MAX_DEPTH = 64
PARAMETERS = ("parameters", "input_schema", "inputSchema", "parametersJsonSchema")
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
}
SCHEMA_KEYS = {"type", "properties", "$ref", "oneOf", "anyOf", "allOf", "enum", "items", "required"}


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


def read_tools(value: Any, findings: Findings, *, where: str = "tools") -> list[Row]:
    """Each with `name`, `description` and `parameters`. The value may be JSON in a text."""
    if is_absent(value):
        return []
    tools = rows_of_columns(parse_json(value))
    if isinstance(tools, dict) and isinstance(function_of(tools).get("name"), str):
        tools = [tools]
    if not isinstance(tools, list):
        what = "text that is not JSON" if isinstance(tools, str) else type_in_words(tools)
        findings.problems.append(f"`{where}` is {what}, not a list of functions")
        return []
    read: list[Row] = []
    for number, tool in enumerate(tools):
        tool = parse_json(tool)
        declarations = tool.get("functionDeclarations") if isinstance(tool, dict) else None
        if isinstance(declarations, list):  # Gemini's
            read += read_tools(declarations, findings, where=f"{where}[{number}]")
        else:
            read.append(read_tool(tool, f"{where}[{number}]", findings))
    return read


def read_tool(tool: Any, where: str, findings: Findings) -> Row:
    function = function_of(tool)
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or is_absent(name):
        kind = tool.get("type") if isinstance(tool, dict) else None
        what = f": only functions are rendered, not {kind!r}" if kind != "function" and kind else ""
        findings.problems.append(f"{where} has no `name`{what}")
        return {"name": "", "description": "", "parameters": None}
    if not is_absent(description) and not isinstance(description, str):
        findings.problems.append(
            f"{where} has {type_in_words(description)} as `description`, not text"
        )
    for owner in (tool, function):
        findings.unread.update(
            f"tools[].{key}" for key in owner.keys() - TOOL_KEYS if owner[key] is not None
        )
    parameters = parse_json(value_of(function, *PARAMETERS))
    if parameters is not None and not isinstance(parameters, dict):
        what = type_in_words(parameters)
        findings.problems.append(f"{where} has {what} as `parameters`, not a JSON schema")
        parameters = None
    if depth_of(parameters, limit=2 * MAX_DEPTH) > 2 * MAX_DEPTH:
        findings.problems.append(f"{where} has `parameters` nested deeper than {MAX_DEPTH} levels")
        parameters = None
    description = description if is_text(description) else ""
    read = {"name": name, "description": description, "parameters": read_schema(parameters)}
    if not is_unicode(json_text(read)):
        findings.problems.append(f"{where} has half a surrogate pair: not valid Unicode")
    return read


def read_schema(parameters: Row | None) -> Any:
    """A JSON schema without the nulls that exporters add, and with JSON schema's names of types.

    Some datasets have `{"city": {"type": "str"}}` for an object with these properties.
    """
    if parameters is None:
        return None
    fields = {key: value for key, value in parameters.items() if value is not None}
    is_properties = fields and not fields.keys() & SCHEMA_KEYS
    if is_properties and all(isinstance(v, dict) and v.get("type") for v in fields.values()):
        optional = {name for name, v in fields.items() if "optional" in str(v["type"])}
        required = [n for n, v in fields.items() if n not in optional and "default" not in v]
        properties = {name: clean_schema(value) for name, value in fields.items()}
        return {"type": "object", "properties": properties, "required": required}
    return clean_schema(parameters)


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
                {name: clean_schema(item) for name, item in value.items() if item is not None}
                if key == "properties" and isinstance(value, dict)
                else clean_schema(value)
            )
    if isinstance(kept.get("type"), str):
        kept["type"] = type_name(kept["type"])
    return kept


def type_name(name: str) -> str:
    """JSON schema's name of a type; Python's `str, optional` becomes `string`."""
    first = name.split(",")[0].strip()
    return PYTHON_TYPES.get(first, first if "optional" in name else name)


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


def without_added_nulls(arguments: Row, parameters: Any) -> Row:
    """The arguments of a call without the nulls that no author wrote.

    Exporters of tables give each call the arguments of all others, as nulls. A null is kept where
    the function's schema allows it.
    """
    if None not in arguments.values():
        return arguments
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    properties = properties if isinstance(properties, dict) else {}
    return {
        name: value
        for name, value in arguments.items()
        if value is not None or allows_null(properties.get(name))
    }
