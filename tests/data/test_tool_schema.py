"""JSON schemas become the TypeScript that openai-harmony writes for them."""

from typing import Any

from hypothesis import given, settings
from openai_harmony import HarmonyEncoding

from finetune.data.harmony import to_messages
from finetune.data.tool_schema import tools_section, type_of
from helpers.harmony_reference import DATE, reference
from helpers.harmony_strategies import SLOW, tool_lists


@settings(SLOW, max_examples=500)
@given(tools=tool_lists)
def test_the_developer_message_of_any_tools_equals_openai_harmonys(
    openai: HarmonyEncoding, tools: list[dict[str, Any]]
) -> None:
    turns = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "thinking": None, "tool_calls": []},
    ]
    conversation = {"messages": turns, "tools": tools}
    developer = to_messages(conversation, date=DATE, reasoning_effort="medium")[1]
    theirs = openai.decode_utf8(reference(openai, conversation))
    assert developer.content in theirs
    assert (developer.author == "developer") == bool(tools)


def test_a_tool_is_written_as_a_typescript_function() -> None:
    city = {"type": "string", "description": "Where."}
    unit = {"type": "string", "enum": ["C", "F"], "default": "C"}
    schema = {
        "type": "object",
        "properties": {"city": city, "unit": unit},
        "required": ["city"],
    }
    weather = {"name": "weather", "description": "Today's.", "parameters": schema}
    time = {"name": "time", "description": "", "parameters": None}
    assert tools_section([weather, time]) == (
        "# Tools\n\n"
        "## functions\n\n"
        "namespace functions {\n\n"
        "// Today's.\n"
        "type weather = (_: {\n"
        "// Where.\n"
        "city: string,\n"
        'unit?: "C" | "F", // default: C\n'
        "}) => any;\n\n"
        "type time = () => any;\n\n"
        "} // namespace functions"
    )


def test_a_schema_that_harmony_does_not_know_is_any() -> None:
    assert type_of({"type": "array", "items": {"type": "integer"}}) == "number[]"
    assert type_of({"type": ["integer", "null"]}) == "number | null"
    assert type_of({"type": "strange"}) == type_of("not a schema") == type_of({}) == "any"
