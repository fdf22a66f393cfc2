"""One conversation as the rows in which datasets of every known shape would hold it.

Each function takes a conversation in the shape that finetune.data.conversations makes of every row,
and returns a row, or None where that shape cannot hold it: Alpaca's has no calls, xLAM's no answer.
They are written from what the formats' authors document, not from the code that reads them.
"""

import json
from collections.abc import Callable
from itertools import count
from typing import Any

Conversation = dict[str, Any]
Spelling = Callable[[Conversation], dict[str, Any] | None]


def columns(conversation: Conversation) -> dict[str, Any]:
    """The columns beside the messages: the tools and the effort."""
    found: dict[str, Any] = {"tools": [openai_tool(tool) for tool in conversation["tools"]]}
    if conversation["reasoning_effort"]:
        found["reasoning_effort"] = conversation["reasoning_effort"]
    return found


def openai_tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": tool}


def openai(
    conversation: Conversation,
    *,
    thinking: str = "thinking",
    are_texts: bool = False,
    are_parts: bool = False,
) -> dict[str, Any]:
    """OpenAI's messages. are_texts: arguments as JSON in a text. are_parts: content as parts."""
    ids = (f"call_{number}" for number in count())
    messages, waiting = [], list[str]()
    for turn in conversation["messages"]:
        message = {"role": turn["role"], "content": turn["content"]}
        if are_parts and turn["content"]:
            message["content"] = [{"type": "text", "text": turn["content"]}]
        if turn.get("thinking"):
            message[thinking] = turn["thinking"]
        if turn.get("tool_calls"):
            message["tool_calls"] = calls = []
            for call in turn["tool_calls"]:
                waiting.append(next(ids))
                given = call["arguments"] if are_texts else json.loads(call["arguments"])
                function = {"name": call["name"], "arguments": given}
                calls.append({"id": waiting[-1], "type": "function", "function": function})
        if turn["role"] == "tool":
            message["tool_call_id"] = waiting.pop(0)
        messages.append(message)
    return {"messages": messages, **columns(conversation)}


def as_json(conversation: Conversation) -> dict[str, Any]:
    """Lists as JSON in texts, as hub datasets with columns of text have them."""
    row = openai(conversation, are_texts=True)
    return row | {name: json.dumps(row[name]) for name in ("messages", "tools")}


def exported(conversation: Conversation) -> dict[str, Any]:
    """What a table makes of it: each message has the keys of all others, as nulls."""
    row = openai(conversation, thinking="reasoning_content")
    keys = {key: None for message in row["messages"] for key in message}
    return row | {"messages": [keys | message for message in row["messages"]], "system": None}


def function_calls(conversation: Conversation) -> dict[str, Any] | None:
    """OpenAI's earlier form: one `function_call` a message, and `functions`."""
    messages = []
    for turn in conversation["messages"]:
        message = {"role": turn["role"], "content": turn["content"]}
        if turn.get("thinking"):
            message["reasoning"] = turn["thinking"]
        calls = turn.get("tool_calls") or []
        if len(calls) > 1:
            return None
        if calls:
            message["function_call"] = calls[0]
        if turn["role"] == "tool":
            message |= {"role": "function", "name": turn["name"]}
        messages.append(message)
    row = {"messages": messages, **columns(conversation), "functions": conversation["tools"]}
    del row["tools"]
    return row


def sharegpt(conversation: Conversation) -> dict[str, Any]:
    """ShareGPT's turns, thinking in R1's tags, calls as LLaMA-Factory has them."""
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    turns = []
    for turn in conversation["messages"]:
        text = f"<think>\n{turn['thinking']}\n</think>\n\n" if turn.get("thinking") else ""
        text += turn["content"] or ""
        calls = turn.get("tool_calls") or []
        if text or not calls:
            turns.append({"from": names.get(turn["role"], "system"), "value": text})
        if calls:
            written = [c | {"arguments": json.loads(c["arguments"])} for c in calls]
            value = written if len(written) > 1 else written[0]
            turns.append({"from": "function_call", "value": json.dumps(value)})
    row = {"conversations": turns, **columns(conversation)}
    return row | {"tools": json.dumps(conversation["tools"])}


def hermes(conversation: Conversation) -> dict[str, Any]:
    """Calls and results in tags inside the text."""
    messages = []
    for turn in conversation["messages"]:
        text = f"<think>{turn['thinking']}</think>" if turn.get("thinking") else ""
        text += turn["content"] or ""
        for call in turn.get("tool_calls") or []:
            value = {"name": call["name"], "arguments": json.loads(call["arguments"])}
            text += f"\n<tool_call>\n{json.dumps(value)}\n</tool_call>"
        if turn["role"] == "tool":
            text = f"<tool_response>\n{text}\n</tool_response>"
        messages.append({"role": turn["role"], "content": text})
    return {"messages": messages, **columns(conversation)}


def mistral(conversation: Conversation) -> dict[str, Any]:
    messages = []
    for turn in conversation["messages"]:
        text = f"[THINK]{turn['thinking']}[/THINK]" if turn.get("thinking") else ""
        text += turn["content"] or ""
        calls = turn.get("tool_calls") or []
        if calls:
            value = [c | {"arguments": json.loads(c["arguments"])} for c in calls]
            text += f"[TOOL_CALLS] {json.dumps(value)}"
        messages.append({"role": turn["role"], "content": text})
    return {"messages": messages, **columns(conversation)}


def harmony(conversation: Conversation) -> dict[str, Any]:
    """Harmony's own messages, with a channel and a recipient."""
    messages: list[dict[str, Any]] = []
    for turn in conversation["messages"]:
        if turn["role"] == "tool":
            name = f"functions.{turn['name']}"
            result = {"role": "tool", "name": name, "channel": "commentary"}
            messages.append(result | {"recipient": "assistant", "content": turn["content"]})
            continue
        if turn["role"] != "assistant":
            content = [{"type": "text", "text": turn["content"]}]
            messages.append({"role": turn["role"], "content": content})
            continue
        calls = turn["tool_calls"]
        texts = [("analysis", turn["thinking"])]
        texts.append(("commentary" if calls else "final", turn["content"]))
        messages += [
            {"role": "assistant", "channel": channel, "content": [{"type": "text", "text": text}]}
            for channel, text in texts
            if text
        ]
        for call in calls:
            message = {"role": "assistant", "channel": "commentary", "content": call["arguments"]}
            recipient = f"functions.{call['name']}"
            messages.append(message | {"recipient": recipient, "content_type": "json"})
    return {"messages": messages, **columns(conversation)}


def tagged_harmony(conversation: Conversation) -> dict[str, Any]:
    """What gpt-oss writes, with its control tokens, as the text of a message."""
    row = openai(conversation)
    for message, turn in zip(row["messages"], conversation["messages"], strict=True):
        if turn["role"] != "assistant":
            continue
        calls = turn["tool_calls"]
        texts = [f"<|channel|>analysis<|message|>{turn['thinking']}<|end|>"] * bool(
            turn["thinking"]
        )
        if turn["content"] and calls:
            texts.append(f"<|channel|>commentary<|message|>{turn['content']}<|end|>")
        elif turn["content"]:
            texts.append(f"<|channel|>final<|message|>{turn['content']}<|return|>")
        for call in calls:
            header = f"<|channel|>commentary to=functions.{call['name']} <|constrain|>json"
            texts.append(f"{header}<|message|>{call['arguments']}<|call|>")
        message.clear()
        message |= {"role": "assistant", "content": "<|start|>assistant".join(texts)}
    for message in row["messages"]:
        message.pop("tool_call_id", None)
    return row


def anthropic(conversation: Conversation) -> dict[str, Any]:
    """Blocks: thinking, text, tool_use; results are the user's. `system` is a column."""
    ids = (f"toolu_{number}" for number in count())
    messages, waiting, system = [], list[str](), None
    for turn in conversation["messages"]:
        if turn["role"] in ("system", "developer"):
            system = turn["content"]
            continue
        if turn["role"] == "tool":
            block = {"type": "tool_result", "tool_use_id": waiting.pop(0)}
            messages.append({"role": "user", "content": [block | {"content": turn["content"]}]})
            continue
        blocks: list[dict[str, Any]] = []
        if turn.get("thinking"):
            blocks.append({"type": "thinking", "thinking": turn["thinking"], "signature": "x"})
        if turn["content"]:
            blocks.append({"type": "text", "text": turn["content"]})
        for call in turn.get("tool_calls") or []:
            waiting.append(next(ids))
            block = {"type": "tool_use", "id": waiting[-1], "name": call["name"]}
            blocks.append(block | {"input": json.loads(call["arguments"])})
        messages.append({"role": turn["role"], "content": blocks})
    tools = [
        {"name": t["name"], "description": t["description"], "input_schema": t["parameters"]}
        for t in conversation["tools"]
    ]
    return {"messages": messages, **columns(conversation), "tools": tools, "system": system}


def gemini(conversation: Conversation) -> dict[str, Any]:
    contents, system = [], None
    for turn in conversation["messages"]:
        if turn["role"] in ("system", "developer"):
            system = {"parts": [{"text": turn["content"]}]}
            continue
        if turn["role"] == "tool":
            answer = {"name": turn["name"], "response": turn["content"]}
            contents.append({"role": "function", "parts": [{"functionResponse": answer}]})
            continue
        parts: list[dict[str, Any]] = []
        if turn.get("thinking"):
            parts.append({"text": turn["thinking"], "thought": True})
        if turn["content"]:
            parts.append({"text": turn["content"]})
        for call in turn.get("tool_calls") or []:
            args = json.loads(call["arguments"])
            parts.append({"functionCall": {"name": call["name"], "args": args}})
        contents.append({"role": {"assistant": "model"}.get(turn["role"], "user"), "parts": parts})
    tools = [{"functionDeclarations": conversation["tools"]}] if conversation["tools"] else []
    row = {"contents": contents, **columns(conversation), "tools": tools}
    return row | {"systemInstruction": system}


def responses(conversation: Conversation) -> dict[str, Any]:
    """The items of OpenAI's Responses API."""
    ids = (f"call_{number}" for number in count())
    items, waiting = list[dict[str, Any]](), list[str]()
    for turn in conversation["messages"]:
        if turn["role"] == "tool":
            item = {"type": "function_call_output", "call_id": waiting.pop(0)}
            items.append(item | {"output": turn["content"]})
            continue
        if turn.get("thinking"):
            summary = [{"type": "summary_text", "text": turn["thinking"]}]
            items.append({"type": "reasoning", "summary": summary})
        if turn["content"]:
            kind = "output_text" if turn["role"] == "assistant" else "input_text"
            content = [{"type": kind, "text": turn["content"]}]
            items.append({"type": "message", "role": turn["role"], "content": content})
        for call in turn.get("tool_calls") or []:
            waiting.append(next(ids))
            items.append({"type": "function_call", "call_id": waiting[-1], **call})
    return {"messages": items, **columns(conversation)}


def prompt_completion(conversation: Conversation) -> dict[str, Any]:
    row = openai(conversation)
    messages = row.pop("messages")
    last = max(n for n, message in enumerate(messages) if message["role"] == "user")
    return {"prompt": messages[: last + 1], "completion": messages[last + 1 :], **row}


def single_exchanges(conversation: Conversation) -> dict[str, Any] | None:
    """The texts of Alpaca and its like: no calls, and thinking in the last answer alone."""
    turns = list(conversation["messages"])
    system = turns.pop(0)["content"] if turns[0]["role"] in ("system", "developer") else None
    if [turn["role"] for turn in turns] != ["user", "assistant"] * (len(turns) // 2):
        return None
    if any(turn.get("tool_calls") for turn in turns) or any(t.get("thinking") for t in turns[:-1]):
        return None
    pairs = [[turns[n]["content"], turns[n + 1]["content"]] for n in range(0, len(turns), 2)]
    row = {"system": system, "history": pairs[:-1], "reasoning": turns[-1]["thinking"]}
    return {"question": pairs[-1][0], "answer": pairs[-1][1], **row, **columns(conversation)}


def in_columns(question: str, answer: str) -> Spelling:
    def spell(conversation: Conversation) -> dict[str, Any] | None:
        row = single_exchanges(conversation)
        if row is None:
            return None
        return {question: row.pop("question"), answer: row.pop("answer"), **row}

    return spell


def xlam(conversation: Conversation) -> dict[str, Any] | None:
    turns = conversation["messages"]
    if [turn["role"] for turn in turns[:2]] != ["user", "assistant"]:
        return None
    if not turns[1]["tool_calls"] or turns[1]["content"] or turns[1]["thinking"]:
        return None
    answers = [c | {"arguments": json.loads(c["arguments"])} for c in turns[1]["tool_calls"]]
    row = columns(conversation) | {"query": turns[0]["content"], "answers": json.dumps(answers)}
    return row | {"tools": json.dumps(conversation["tools"])}


SPELLINGS: dict[str, Spelling] = {
    "OpenAI": openai,
    "OpenAI, arguments as text": lambda c: openai(c, are_texts=True, thinking="reasoning_content"),
    "OpenAI, parts": lambda c: openai(c, are_parts=True, thinking="reasoning"),
    "JSON in texts": as_json,
    "exported by a table": exported,
    "function_call": function_calls,
    "ShareGPT": sharegpt,
    "Hermes": hermes,
    "Mistral": mistral,
    "harmony": harmony,
    "harmony's tags": tagged_harmony,
    "Anthropic": anthropic,
    "Gemini": gemini,
    "Responses API": responses,
    "prompt and completion": prompt_completion,
    "Alpaca": in_columns("instruction", "output"),
    "Dolly": in_columns("instruction", "response"),
    "OpenOrca": in_columns("question", "response"),
    "ms-swift": in_columns("query", "response"),
    "texts of prompt and completion": in_columns("prompt", "completion"),
    "xLAM": xlam,
}
