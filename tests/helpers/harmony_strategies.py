"""Hypothesis strategies for conversations and for tools, malformed schemas included."""

import json
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Examples are slow to generate and depend on session fixtures; neither says anything about a test.
SLOW = settings(deadline=None, suppress_health_check=list(HealthCheck))

words = st.sampled_from(
    [
        "Hello",
        " world",
        "\n\n",
        "  ",
        "2+2=4",
        "naïve café",
        "日本語",
        "🙂",
        "\u200b",
        "def f():\n\t",
        "<|start|>assistant",
        "<|end|>",
        "<|return|>",
        "<|reserved_200013|>",
        "<|im_end|>",
        "'ll",
    ]
)
texts = st.lists(words, min_size=1, max_size=6).map("".join) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20
)
names = st.sampled_from(["get_weather", "search", "run_sql_2"])
lines = st.lists(words.filter(lambda w: "\n" not in w), min_size=1, max_size=3).map("".join)
scalars = st.none() | st.booleans() | st.integers(-9, 9**9) | lines


def optional(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


def schemas_with(children: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Schemas that hold other schemas."""
    notes = {"description": lines, "title": lines, "nullable": st.booleans(), "default": scalars}
    properties = st.dictionaries(st.sampled_from(["city", "n", "deep", "x_1"]), children)
    required = st.lists(st.sampled_from(["city", "n", "deep"]))
    objects = optional({**notes, "properties": properties, "required": required}).map(
        lambda schema: {"type": "object", **schema}
    )
    arrays = optional({**notes, "items": children}).map(lambda schema: {"type": "array", **schema})
    unions = st.builds(
        lambda schema, variants: {**schema, "oneOf": variants},
        optional({**notes, "examples": st.lists(scalars)}),
        st.lists(children, max_size=3),
    )
    return objects | arrays | unions


simple_schemas = optional(
    {
        "type": st.sampled_from(["string", "number", "integer", "boolean", "null", "strange"])
        | st.lists(st.sampled_from(["string", "integer", "null"]), max_size=3),
        "description": lines,
        "title": lines,
        "enum": st.lists(lines | st.integers(), max_size=3),
        "default": scalars | st.lists(st.integers(0, 9), max_size=3),
        "examples": st.lists(lines | st.integers(), max_size=2),
        "nullable": st.booleans(),
    }
)
schemas = st.recursive(simple_schemas, schemas_with, max_leaves=6)
tool_lists = st.lists(
    st.fixed_dictionaries(
        {"name": names, "description": texts | st.just(""), "parameters": st.none() | schemas}
    ),
    max_size=3,
)


@st.composite
def conversations(draw: st.DrawFn, max_turns: int = 4) -> dict[str, Any]:
    """Conversations in the shape that finetune.data.conversations makes of every row."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        role = draw(st.sampled_from(["system", "developer"]))
        messages.append({"role": role, "content": draw(texts)})
    thinking = st.none() | texts
    for _ in range(draw(st.integers(1, max_turns))):
        messages.append({"role": "user", "content": draw(texts)})
        for _ in range(draw(st.integers(0, 2))):
            calls = st.fixed_dictionaries({"name": names, "arguments": texts})
            turn: dict[str, Any] = {
                "role": "assistant",
                "content": draw(st.none() | texts),
                "thinking": draw(thinking),
                "tool_calls": draw(st.lists(calls, min_size=1, max_size=2)),
            }
            messages.append(turn)
            for call in turn["tool_calls"]:
                result = draw(texts | st.just(""))
                messages.append({"role": "tool", "name": call["name"], "content": result})
        # One turn in six ends with the results of its tools.
        if draw(st.integers(0, 5)) or messages[-1]["role"] == "user":
            answer: dict[str, Any] = {"content": draw(texts), "thinking": draw(thinking)}
            messages.append({"role": "assistant", **answer, "tool_calls": []})
    effort = draw(st.sampled_from([None, "low", "medium", "high"]))
    return {"messages": messages, "tools": draw(tool_lists), "reasoning_effort": effort}


plain_words = st.sampled_from(
    ["Hello", "world", "2+2=4", "naïve café", "日本語", "🙂", "{", "'ll", "a\n\nb"]
)
plain_texts = st.lists(plain_words, min_size=1, max_size=4).map(" ".join)
# What every shape can hold: no nulls, which exporters add, and no lists of names alone.
plain_arguments = st.dictionaries(
    st.sampled_from(["city", "n"]), st.integers() | plain_texts | st.lists(plain_texts), max_size=2
)
plain_tools = st.lists(
    st.fixed_dictionaries(
        {
            "name": names,
            "description": plain_texts,
            "parameters": st.just(
                {
                    "type": "object",
                    "properties": {"city": {"type": "string", "description": "City"}},
                }
            ),
        }
    ),
    max_size=2,
    unique_by=lambda tool: str(tool["name"]),  # two of one name are a problem of the row
)


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@st.composite
def plain_conversations(draw: st.DrawFn) -> dict[str, Any]:
    """Conversations without markup or blank text, which every shape that has room can hold.

    Each is in the shape that finetune.data.conversations makes of every row.
    """
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(plain_texts)})
    has_calls, thinking = draw(st.booleans()), st.none() | plain_texts
    calls = st.fixed_dictionaries({"name": names, "arguments": plain_arguments.map(json_text)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(plain_texts)})
        for _ in range(draw(st.integers(0, 2)) if has_calls else 0):
            turn: dict[str, Any] = {"role": "assistant", "content": draw(st.none() | plain_texts)}
            turn |= {"thinking": draw(thinking)}
            turn["tool_calls"] = draw(st.lists(calls, min_size=1, max_size=2))
            messages.append(turn)
            for call in turn["tool_calls"]:
                result = draw(plain_texts)
                messages.append({"role": "tool", "name": call["name"], "content": result})
        answer: dict[str, Any] = {"content": draw(plain_texts), "thinking": draw(thinking)}
        messages.append({"role": "assistant", **answer, "tool_calls": []})
    effort = draw(st.sampled_from([None, "low", "medium", "high"]))
    return {"messages": messages, "tools": draw(plain_tools), "reasoning_effort": effort}
