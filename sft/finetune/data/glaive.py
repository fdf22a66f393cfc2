"""Glaive's function calling data: a conversation in one text, and its functions in another."""

import re

from finetune.data.values import Row, is_absent, parse_json

ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
SPEAKER = re.compile(r"^\s*(USER|ASSISTANT|FUNCTION RESPONSE):", re.MULTILINE)


def messages_of_chat(chat: str) -> list[Row] | None:
    """The messages of a text with `USER:` and so on before each; None if it is no such text."""
    before, *rest = SPEAKER.split(chat)
    if not rest or not is_absent(before):
        return None
    return [
        {
            "role": ROLES[speaker],
            "content": text.strip().removesuffix("<|endoftext|>").rstrip(),
        }
        for speaker, text in zip(rest[::2], rest[1::2], strict=True)
    ]


def system_message(system: str) -> Row:
    """The message of a text that ends in functions, each as JSON that begins on a line."""
    text, *schemas = re.split(r"^(?=\{)", system.strip(), flags=re.MULTILINE)
    tools = [parse_json(schema.strip()) for schema in schemas]
    if not all(isinstance(tool, dict) and tool.keys() & {"name", "function"} for tool in tools):
        text, tools = system, []
    content = text.strip().removeprefix("SYSTEM:").strip().removesuffix("-").rstrip()
    return {"role": "system", "content": content, "tools": tools}
