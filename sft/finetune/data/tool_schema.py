"""JSON schemas of tools as the TypeScript types that gpt-oss reads, in harmony's spelling."""

import json
import re
from typing import Any


def tools_section(tools: list[dict[str, Any]], *, namespace: str = "functions") -> str:
    """The `# Tools` section for tools with `name`, `description` and, if any, `parameters`."""
    lines = [f"## {namespace}\n", f"namespace {namespace} {{\n"]
    for tool in tools:
        lines += [f"// {line}" for line in lines_of(tool.get("description") or "")]
        schema = tool.get("parameters")
        arguments = "" if schema is None else f"_: {type_of(schema)}"
        lines.append(f"type {tool['name']} = ({arguments}) => any;\n")
    return "# Tools\n\n" + "\n".join([*lines, f"}} // namespace {namespace}"])


def lines_of(text: str) -> list[str]:
    """Its lines; unlike str.splitlines, only line feeds part them."""
    lines = re.split("\r?\n", text)
    return lines if lines[-1] else lines[:-1]


def type_of(schema: Any, indent: str = "") -> str:
    """The type a JSON schema describes; `any` where harmony knows no better."""
    if not isinstance(schema, dict):
        return "any"
    if isinstance(schema.get("oneOf"), list):
        return union_of(schema["oneOf"], indent)
    kind = schema.get("type")
    if isinstance(kind, list):
        names = ["number" if name == "integer" else name for name in kind if isinstance(name, str)]
        return " | ".join(names) or "any"
    if kind == "object":
        return object_of(schema, indent)
    if kind == "string":
        values = schema["enum"] if is_enum(schema) else []
        return " | ".join(f'"{value}"' for value in values if isinstance(value, str)) or "string"
    if kind == "array":
        return f"{type_of(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    return {"number": "number", "integer": "number", "boolean": "boolean"}.get(str(kind), "any")


def union_of(variants: list[Any], indent: str) -> str:
    """A union outside a property: each variant on a line of its own, with its comments behind."""
    text = ""
    for variant in variants:
        comments = [description_of(variant), default_of(variant, bare_enums=False)]
        text += f"\n{indent} | {nullable_type_of(variant, indent + '   ')}{behind(comments)}"
    return text


def object_of(schema: dict[str, Any], indent: str) -> str:
    description = description_of(schema)
    text = f"{indent}// {description}\n{{\n" if description is not None else "{\n"
    properties = schema.get("properties")
    required = schema["required"] if is_list(schema.get("required")) else []
    for name, value in properties.items() if isinstance(properties, dict) else ():
        text += property_of(name if name in required else f"{name}?", value, indent)
    return f"{text}{indent}}}"


def property_of(name: str, value: Any, indent: str) -> str:
    """A property's comments above it, its name, its type and its default."""
    fields = value if isinstance(value, dict) else {}
    text = ""
    if isinstance(fields.get("title"), str):
        text += f"{indent}// {fields['title']}\n{indent}//\n"
    if "oneOf" not in fields and description_of(fields) is not None:
        text += f"{indent}// {description_of(fields)}\n"
    if is_list(fields.get("examples")) and fields["examples"]:
        text += f"{indent}// Examples:\n"
        examples = [example for example in fields["examples"] if isinstance(example, str)]
        text += "".join(f'{indent}// - "{example}"\n' for example in examples)
    if is_list(fields.get("oneOf")):
        return text + union_property_of(name, fields, indent)
    default = None if "oneOf" in fields else default_of(fields)
    return f"{text}{indent}{name}: {nullable_type_of(value, indent + '    ')},{behind([default])}\n"


def union_property_of(name: str, fields: dict[str, Any], indent: str) -> str:
    """A property whose type is a union; what its first variant says alike is said once."""
    variants = fields["oneOf"]
    description = description_of(fields)
    above = description is not None and description != description_of(variants[:1])
    text = f"{indent}// {description}\n" if above else ""
    default = default_of(fields)
    text += f"{indent}// {default}\n" if default is not None else ""
    text += f"{indent}{name}:\n"
    for number, variant in enumerate(variants):
        comments = [default_of(variant)]
        if not (number == 0 and above) and description_of(variant) != description:
            comments.insert(0, description_of(variant))
        text += f"{indent} | {nullable_type_of(variant, indent + '   ')}{behind(comments)}\n"
    return f"{text}{indent},\n"


def nullable_type_of(schema: Any, indent: str) -> str:
    text = type_of(schema, indent)
    nullable = isinstance(schema, dict) and schema.get("nullable") is True
    return f"{text} | null" if nullable and "null" not in text else text


def description_of(schema: Any) -> str | None:
    """Of a schema, or of the first of a list of them."""
    first = next(iter(schema), None) if is_list(schema) else schema
    description = first.get("description") if isinstance(first, dict) else None
    return description if isinstance(description, str) else None


def default_of(schema: Any, *, bare_enums: bool = True) -> str | None:
    """`default: ...` in JSON; the values of enums stand without quotes where bare_enums."""
    if not isinstance(schema, dict) or "default" not in schema:
        return None
    default = schema["default"]
    if isinstance(default, str) and not is_enum(schema):
        return f'default: "{default}"'
    if isinstance(default, str) and bare_enums:
        return f"default: {default}"
    return f"default: {json.dumps(default, ensure_ascii=False, separators=(',', ':'))}"


def behind(comments: list[str | None]) -> str:
    said = [comment for comment in comments if comment is not None]
    return f" // {' '.join(said)}" if said else ""


def is_enum(schema: dict[str, Any]) -> bool:
    return is_list(schema.get("enum")) and bool(schema["enum"])


def is_list(value: Any) -> bool:
    return isinstance(value, list)
