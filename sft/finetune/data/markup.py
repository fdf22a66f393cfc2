"""Other formats' markup inside the text of an assistant: thinking and calls that are spelt out.

Trained as it stands, it would teach the model to write the tags of another model as its answer.
What is unambiguous is read as what it means: a list of (kind, value), where kind is "thinking",
"text", "preamble", "final" or "call". All else stays text, with a warning.
"""

import json
import re
from typing import Any, NamedTuple

from finetune.data.values import is_absent, python_literal


class Part(NamedTuple):
    """A part of what the assistant writes. value: text, or an object for a call."""

    kind: str
    value: Any


class Unclear(ValueError):
    """Markup that can be read in more than one way. The message says why."""


THINKING_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<seed:think>", "</seed:think>"),
    ("<Think>", "</Think>"),
    ("<THINK>", "</THINK>"),
    ("<thoughts>", "</thoughts>"),
    ("<thought_process>", "</thought_process>"),
    ("<inner_thoughts>", "</inner_thoughts>"),
    ("<inner_monologue>", "</inner_monologue>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<antThinking>", "</antThinking>"),
    ("<|think|>", "<|/think|>"),
    ("<|think_start|>", "<|think_end|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought\n", "<channel|>"),
)
# What the answer may stand in, behind the thinking.
SOLUTION_TAGS = (
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
    ("<answer>", "</answer>"),
    ("<solution>", "</solution>"),
    ("<response>", "</response>"),
    ("<output>", "</output>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)
# Tokens with which another model opens and ends an answer. They are no part of it.
OPENINGS = (
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<start_of_turn>model\n",
    "<|assistant|>\n",
    "<|assistant|>",
)
ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<|end_of_turn|>",
    "<｜end▁of▁sentence｜>",
    "<|return|>",
    "<|end|>",
    "</s>",
    "<eos>",
)
# Markup of models that is left in a text: nothing of it is meant to be written by gpt-oss.
FOREIGN = re.compile(
    r"<\|[a-zA-Z_/][\w/-]{1,40}\|>|</?(?:seed:)?think(?:ing)?>|◁/?think▷|\[/?INST\]"
    r"|</?(?:start|end)_of_turn>|<function=\w|</?tool_(?:call|code|response)>"
    r"|<｜[^｜\n]{1,40}｜>|</?function_calls>|<invoke name=|</?minimax:\w+>|</?tool_use>"
    r"|functools\[\{|\A\[\w+(?:\.\w+)*\([^\n]*\)\]\s*\Z|^Action Input:|<\|channel>|<SPECIAL_\d+>"
    r"|<extra_id_\d+>"
    r"|\A\s*<(?:analysis|reason|reflection|plan)>|\A<s>"
    r"|\A ?analysis(?=[\s\S]*assistantfinal)|</s>\s*\Z",
    re.IGNORECASE | re.MULTILINE,
)
CALL_TAGS = (
    ("<tool_call>", "</tool_call>"),
    ("<tool_calls>", "</tool_calls>"),
    ("<function_call>", "</function_call>"),
    ("<functioncall>", "</functioncall>"),
    ("[TOOL_CALLS]", "[/TOOL_CALLS]"),
    ("<|tool_call|>", "<|/tool_call|>"),
    ("<|python_tag|>", "<|eom_id|>"),
)
RESULT_TAGS = ("<tool_response>", "</tool_response>")
# Markup that a document of plain text begins with if it was rendered for another model.
TEMPLATES = (
    "<|im_start|>",
    "<s>[INST]",
    "[INST]",
    "<|begin_of_text|><|start_header_id|>",
    "<|start_header_id|>",
    "<bos><start_of_turn>",
    "<start_of_turn>",
    "### Human:",
    "<|user|>",
    "<|system|>",
    "### Instruction:",
    "Below is an instruction that describes a task",
    "Human: ",
    "USER: ",
    "User: ",
    "### User:",
    "### System:",
    "<human>:",
)
HARMONY = re.compile(
    r"(?:(?:<\|start\|>)?assistant)?(?: ?to=(?P<to>[\w.-]+))?"
    r"<\|channel\|>(?P<channel>analysis|commentary|final)(?: to=(?P<to_too>[\w.-]+))?"
    r"(?: ?<\|constrain\|>\w+| json| code)?"
    r"<\|message\|>(?P<text>.*?)(?:<\|end\|>|<\|return\|>|<\|call\|>|\Z)",
    re.DOTALL,
)
# The keys of a call that stands in a text as JSON, without any tag.
BARE_CALLS = ({"name", "arguments"}, {"name", "parameters"}, {"type", "name", "parameters"})
# Most answers have none of these, and are looked at no further.
SIGNS = ("<", "[", "◁")
WORDS = ("assistantfinal", "Action Input:")


def opening_of_template(text: str) -> str | None:
    """The markup that a text begins with if it was rendered for another model; None otherwise."""
    return next((opening for opening in TEMPLATES if text.startswith(opening)), None)


def foreign_tag(text: str) -> str | None:
    """Another model's markup in a text, in the words of a warning; None if there is none."""
    if not any(sign in text for sign in (*SIGNS, *WORDS)):
        return None  # as most texts: the search below looks at each of their characters
    match = FOREIGN.search(text)
    return match and match[0].strip()


def name_in_bare_call(text: str) -> str | None:
    """The name in a text that is a call as JSON and nothing else; None for any other text.

    Llama 3.1's models write calls so. It is no call here: an answer may well be such an object.
    """
    if not text.lstrip().startswith("{") or '"name"' not in text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_call = isinstance(value, dict) and value.keys() in BARE_CALLS
    return value["name"] if is_call and isinstance(value["name"], str) else None


def read_markup(text: str) -> tuple[list[Part], list[str]] | None:
    """The parts of a text and the markup found; None if there is none. Raises Unclear."""
    if not any(sign in text for sign in SIGNS):
        return None
    if "<|channel|>" in text:
        return read_harmony(text)
    found: list[str] = []
    thinking, answer = split_thinking(without_frame(text, found), found)
    parts = [Part("thinking", thinking)] if not is_absent(thinking) else []
    parts += split_calls(answer, found)
    return (parts, found) if found else None


def without_frame(text: str, found: list[str]) -> str:
    """The text without the tokens with which another model opens and ends its answer."""
    for opening in OPENINGS:
        if text.lstrip().startswith(opening):
            found.append(f"`{opening.strip()}` before an answer left out")
            text = text.lstrip().removeprefix(opening)
    while (end := next((tag for tag in ENDS if text.rstrip().endswith(tag)), None)) is not None:
        if text.count(end) > 1:
            break
        found.append(f"`{end}` behind an answer left out")
        text = text.rstrip().removesuffix(end).rstrip("\n")
    return text


def read_harmony(text: str) -> tuple[list[Part], list[str]] | None:
    """Messages of harmony, if there is nothing but them."""
    parts, end = [], 0
    text = text.strip()
    if not text.startswith(("<|channel|>", "<|start|>assistant", "assistant<|", "to=", " to=")):
        raise Unclear("`<|channel|>` inside its text")
    while end < len(text):
        match = HARMONY.match(text, end)
        if match is None:
            raise Unclear("`<|channel|>`, but not only messages of harmony")
        end = match.end() + len(text[match.end() :]) - len(text[match.end() :].lstrip())
        recipient, content = match["to"] or match["to_too"], match["text"]
        if recipient:
            if not recipient.startswith("functions."):
                raise Unclear(f"`<|channel|>` with the recipient {recipient}")
            parts.append(Part("call", {"name": recipient, "arguments": content}))
        else:
            kinds = {"analysis": "thinking", "commentary": "preamble", "final": "final"}
            parts.append(Part(kinds[match["channel"]], content))
    return parts, ["`<|channel|>` read as harmony's messages"]


def split_thinking(text: str, found: list[str]) -> tuple[str, str]:
    """The thinking that a text begins with, and the text behind it."""
    body = text.lstrip()
    for opening, closing in THINKING_TAGS:
        if opening not in text and closing not in text:
            continue
        # R1's template writes the opening tag itself, so that some datasets lack it.
        is_implied = opening == "<think>" and "<think" not in text
        if not body.startswith(opening) and not is_implied:
            if opening in ("<think>", "[THINK]") or opening not in text:
                raise Unclear(f"`{opening}` behind the beginning of its text")
            continue
        if text.count(opening) > 1 or text.count(closing) != 1:
            raise Unclear(f"`{opening}` and `{closing}` that do not make one pair")
        thinking, _, answer = body.removeprefix(opening).partition(closing)
        found.append(f"`{opening.strip()}` read as thinking")
        return thinking.strip(), unwrapped(answer)
    return "", text


def unwrapped(answer: str) -> str:
    """The answer behind the thinking, without the tags that hold all of it."""
    for opening, closing in SOLUTION_TAGS:
        inner = answer.strip().removeprefix(opening).removesuffix(closing)
        if f"{opening}{inner}{closing}" == answer.strip() and opening not in inner:
            return inner.strip("\n")
    return answer.lstrip().strip("\n")


def split_calls(text: str, found: list[str]) -> list[Part]:
    """The text before the calls, and the calls."""
    for opening, closing in CALL_TAGS:
        if opening not in text:
            continue
        before, *blocks = text.split(opening)
        parts = [] if is_absent(before) else [Part("text", before.strip())]
        for block in blocks:
            block, _, after = block.removesuffix("<|endoftext|>").partition(closing)
            if not is_absent(after):
                raise Unclear(f"text behind `{closing}`")
            parts += [Part("call", call) for call in calls_in(block, opening)]
        found.append(f"`{opening}` read as calls")
        return parts
    return [] if is_absent(text) else [Part("text", text)]


def calls_in(block: str, opening: str) -> list[Any]:
    """The calls in a block of JSON. Raises Unclear if it holds anything else."""
    if match := re.fullmatch(
        r"(?P<name>[\w.-]+)\[ARGS\](?P<arguments>\{.*\})\s*", block, re.DOTALL
    ):
        return [match.groupdict()]  # Mistral's
    try:
        value = json.loads(block)
    except (ValueError, RecursionError):
        # Hermes has what Python prints for an object.
        value = python_literal(block.strip())
        if isinstance(value, dict | list):
            return checked_calls(value, opening)
        # Glaive writes the arguments between single quotes.
        match = re.fullmatch(
            r'\s*\{"name": "(?P<name>[\w.-]+)", "arguments": \'(?P<arguments>.*)\'\}\s*',
            block,
            re.DOTALL,
        )
        if match is None:
            raise Unclear(f"`{opening}` before what is not JSON") from None
        value = match.groupdict()
    return checked_calls(value, opening)


def checked_calls(value: Any, opening: str) -> list[Any]:
    """The value as a list of calls. Raises Unclear if it holds anything else."""
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else {}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unclear(f"`{opening}` before what is no call")
    return calls


def read_results(text: str) -> list[str] | None:
    """The tools' results in a text that holds nothing but them; None if it holds anything else."""
    opening, closing = RESULT_TAGS
    if not text.lstrip().startswith(opening):
        return None
    before, *blocks = text.split(opening)
    results = []
    for block in blocks:
        result, tag, after = block.partition(closing)
        if not tag or not is_absent(after):
            return None
        results.append(result.strip())
    return results
