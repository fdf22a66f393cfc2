"""The JSON schemas of tools as the TypeScript that gpt-oss reads.

This follows openai-harmony 0.0.8 character for character, its oddities too; the tests compare the
two on random schemas, malformed ones included.
"""

import json
import re
from typing import Any


def tools_section(tools: list[dict[str, Any]], *, namespace: str = "functions") -> str:
    """The `# Tools` section of the developer message.

    tools: each with `name`, `description` and, if it takes arguments, `parameters`.
    """
    lines = [f"## {namespace}\n", f"namespace {namespace} {{\n"]
    for tool in tools:
        lines += [f"// {line}" for line in split_lines(tool.get("description") or "")]
        schema = tool.get("parameters")
        arguments = "" if schema is None else f"_: {type_of(schema)}"
        lines.append(f"type {tool['name']} = ({arguments}) => any;\n")
    return "# Tools\n\n" + "\n".join([*lines, f"}} // namespace {namespace}"])


def split_lines(text: str) -> list[str]:
    """The lines of a text, split at line feeds only (str.splitlines splits at more)."""
    lines = re.split("\r?\n", text)
    return lines if lines[-1] else lines[:-1]


def type_of(schema: Any, indent: str = "") -> str:
    """The type that a JSON schema describes; `any` where harmony does not know better."""
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
    """A union that is not the type of a property.

    Each variant is on a line of its own, followed by its comments.
    """
    text = ""
    for variant in variants:
        comment = trailing_comment([description_of(variant), default_of(variant, bare_enums=False)])
        text += f"\n{indent} | {nullable_type_of(variant, indent + '   ')}{comment}"
    return text


def object_of(schema: dict[str, Any], indent: str) -> str:
    """An object type, one property on each line."""
    description = description_of(schema)
    text = f"{indent}// {description}\n{{\n" if description is not None else "{\n"
    properties = schema.get("properties")
    required = schema["required"] if isinstance(schema.get("required"), list) else []
    for name, value in properties.items() if isinstance(properties, dict) else ():
        text += property_of(name if name in required else f"{name}?", value, indent)
    return f"{text}{indent}}}"


def property_of(name: str, value: Any, indent: str) -> str:
    """A property: its comments on lines above it, its name, its type and its default."""
    fields = value if isinstance(value, dict) else {}
    text = ""
    if isinstance(fields.get("title"), str):
        text += f"{indent}// {fields['title']}\n{indent}//\n"
    if "oneOf" not in fields and description_of(fields) is not None:
        text += f"{indent}// {description_of(fields)}\n"
    if isinstance(fields.get("examples"), list) and fields["examples"]:
        text += f"{indent}// Examples:\n"
        examples = [example for example in fields["examples"] if isinstance(example, str)]
        text += "".join(f'{indent}// - "{example}"\n' for example in examples)
    if isinstance(fields.get("oneOf"), list):
        return text + union_property_of(name, fields, indent)
    default = None if "oneOf" in fields else default_of(fields)
    comment = trailing_comment([default])
    return f"{text}{indent}{name}: {nullable_type_of(value, indent + '    ')},{comment}\n"


def union_property_of(name: str, fields: dict[str, Any], indent: str) -> str:
    """A property whose type is a union.

    The property's description is written above it, unless the first variant has the same one. A
    variant's description is written beside the variant, unless the property has the same one.
    """
    variants = fields["oneOf"]
    description = description_of(fields)
    first_description = description_of(variants[0]) if variants else None
    is_above = description is not None and description != first_description
    text = f"{indent}// {description}\n" if is_above else ""
    default = default_of(fields)
    text += f"{indent}// {default}\n" if default is not None else ""
    text += f"{indent}{name}:\n"
    for number, variant in enumerate(variants):
        comments = [default_of(variant)]
        # harmony also omits the first variant's description if the property's is above it.
        is_hidden = number == 0 and is_above
        if not is_hidden and description_of(variant) != description:
            comments.insert(0, description_of(variant))
        variant_type = nullable_type_of(variant, indent + "   ")
        text += f"{indent} | {variant_type}{trailing_comment(comments)}\n"
    return f"{text}{indent},\n"


def nullable_type_of(schema: Any, indent: str) -> str:
    text = type_of(schema, indent)
    nullable = isinstance(schema, dict) and schema.get("nullable") is True
    return f"{text} | null" if nullable and "null" not in text else text


def description_of(schema: Any) -> str | None:
    description = schema.get("description") if isinstance(schema, dict) else None
    return description if isinstance(description, str) else None


def default_of(schema: Any, *, bare_enums: bool = True) -> str | None:
    """`default: ...` with the value as JSON; None if there is no default.

    bare_enums: write the values of enums without quotes.
    """
    if not isinstance(schema, dict) or "default" not in schema:
        return None
    default = schema["default"]
    if isinstance(default, str) and not is_enum(schema):
        return f'default: "{default}"'
    if isinstance(default, str) and bare_enums:
        return f"default: {default}"
    return f"default: {json.dumps(default, ensure_ascii=False, separators=(',', ':'))}"


def trailing_comment(comments: list[str | None]) -> str:
    """A comment for the end of a line, of those comments that are not None; may be empty."""
    texts = [comment for comment in comments if comment is not None]
    return f" // {' '.join(texts)}" if texts else ""


def is_enum(schema: dict[str, Any]) -> bool:
    return isinstance(schema.get("enum"), list) and bool(schema["enum"])
