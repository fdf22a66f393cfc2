"""Conversations rendered by openai-harmony or by oss-harmony, its fork, the way vLLM calls them.

This is written against them alone, so that it shares no mistake with finetune.data. Both have the
same classes; the one that renders is given as `openai`.
"""

from typing import Any

from openai_harmony import (
    Author,
    Conversation,
    DeveloperContent,
    HarmonyEncoding,
    Message,
    ReasoningEffort,
    RenderConversationConfig,
    Role,
    SystemContent,
    ToolDescription,
)

DATE = "2026-01-02"
NOTHING_DROPPED = RenderConversationConfig(auto_drop_analysis=False)


def reference(openai: HarmonyEncoding, conversation: dict[str, Any]) -> list[int]:
    """The tokens of the prompt that vLLM makes for the last turn, followed by that turn."""
    prompt, last_turn = openai_messages(conversation)
    # What auto_drop_analysis_messages does:
    # vllm/entrypoints/openai/chat_completion/harmony.py at commit 8fada2f.
    finals = [n for n, message in enumerate(prompt) if message.channel == "final"]
    last_final = finals[-1] if finals else -1
    kept = [m for n, m in enumerate(prompt) if n >= last_final or m.channel != "analysis"]
    complete = Conversation.from_messages(kept + last_turn)
    return openai.render_conversation_for_training(complete, NOTHING_DROPPED)


def default_reference(openai: HarmonyEncoding, conversation: dict[str, Any]) -> list[int]:
    """The same tokens if openai-harmony's default, not vLLM, drops analysis from the prompt."""
    prompt, last_turn = openai_messages(conversation)
    tokens = openai.render_conversation_for_completion(
        Conversation.from_messages(prompt), Role.ASSISTANT
    )
    opening = openai.encode("<|start|>assistant", allowed_special="all")
    assert tokens[-len(opening) :] == opening
    turn = Conversation.from_messages(last_turn)
    return tokens[: -len(opening)] + openai.render_conversation_for_training(turn, NOTHING_DROPPED)


def openai_messages(conversation: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    """The messages up to and including the last user's, and those after it."""
    effort = {"low": ReasoningEffort.LOW, "high": ReasoningEffort.HIGH}.get(
        conversation.get("reasoning_effort") or "", ReasoningEffort.MEDIUM
    )
    system = SystemContent.new().with_reasoning_effort(effort).with_conversation_start_date(DATE)
    messages = [Message.from_role_and_content(Role.SYSTEM, system)]
    turns = conversation["messages"]
    tools = [
        ToolDescription.new(t["name"], t["description"], parameters=t["parameters"])
        for t in conversation["tools"]
    ]
    if tools and turns[0]["role"] not in ("system", "developer"):
        content = DeveloperContent.new().with_function_tools(tools)
        messages.append(Message.from_role_and_content(Role.DEVELOPER, content))
    for number, turn in enumerate(turns):
        if turn["role"] in ("system", "developer"):
            content = DeveloperContent.new().with_instructions(turn["content"])
            content = content.with_function_tools(tools) if tools and number == 0 else content
            messages.append(Message.from_role_and_content(Role.DEVELOPER, content))
        elif turn["role"] == "tool":
            author = Author.new(Role.TOOL, f"functions.{turn['name']}")
            result = Message.from_author_and_content(author, turn["content"])
            messages.append(result.with_channel("commentary").with_recipient("assistant"))
        elif turn["role"] == "user":
            messages.append(Message.from_role_and_content(Role.USER, turn["content"]))
        else:
            messages += assistant_messages(turn)
    last_user = max(n for n, message in enumerate(messages) if message.author.role == Role.USER)
    return messages[: last_user + 1], messages[last_user + 1 :]


def assistant_messages(turn: dict[str, Any]) -> list[Message]:
    messages = []
    if turn["thinking"]:
        message = Message.from_role_and_content(Role.ASSISTANT, turn["thinking"])
        messages.append(message.with_channel("analysis"))
    if turn["content"]:
        message = Message.from_role_and_content(Role.ASSISTANT, turn["content"])
        messages.append(message.with_channel("commentary" if turn["tool_calls"] else "final"))
    for call in turn["tool_calls"]:
        message = Message.from_role_and_content(Role.ASSISTANT, call["arguments"])
        message = message.with_channel("commentary").with_recipient(f"functions.{call['name']}")
        messages.append(message.with_content_type("<|constrain|>json"))
    return messages
