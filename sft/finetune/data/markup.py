"""Other formats' markup inside the text of an assistant: thinking and calls that are spelt out.

Trained as it stands, it would teach the model to write the tags of another model as its answer.
What is unambiguous is read as what it means: a list of (kind, value), where kind is "thinking",
"text", "preamble", "final" or "call". All else stays text, with a warning.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from finetune.data.json_rows import unique_keys
from finetune.data.values import is_absent, python_literal

Match = re.Match[str]


class Part(NamedTuple):
    """A part of what the assistant writes. value: text, or an object for a call.

    is_text: the call stood in a text, where all of it is its author's.
    """

    kind: str
    value: Any
    is_text: bool = False


class Unclear(ValueError):
    """Markup that can be read in more than one way. The message says why."""


# Capitals and spaces before the `>` are no difference.
THINKING_TAGS = (
    ("<think>", "</think>"),
    ("&lt;think&gt;", "&lt;/think&gt;"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<seed:think>", "</seed:think>"),
    ("<thoughts>", "</thoughts>"),
    ("<thought_process>", "</thought_process>"),
    ("<inner_thoughts>", "</inner_thoughts>"),
    ("<inner_monologue>", "</inner_monologue>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<scratch_pad>", "</scratch_pad>"),
    ("<internal_monologue>", "</internal_monologue>"),
    ("<reasoning_process>", "</reasoning_process>"),
    ("<begin_of_thought>", "<end_of_thought>"),
    ("<start_working_out>", "<end_working_out>"),
    ("<rationale>", "</rationale>"),
    ("<cot>", "</cot>"),
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
    ("<conclusion>", "</conclusion>"),
    ("<begin_of_solution>", "<end_of_solution>"),
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)


def pattern_of(tag: str) -> re.Pattern[str]:
    is_html = tag.startswith("<") and tag.endswith(">")
    text = re.escape(tag[:-1]) + r"\s*>" if is_html else re.escape(tag)
    return re.compile(text, re.IGNORECASE)


# Most texts have no tag, and to look for one by its pattern takes longer than for these.
STEMS = [tuple(tag.lower().rstrip(">") for tag in pair) for pair in THINKING_TAGS]
PATTERNS = {tag: pattern_of(tag) for pair in (*THINKING_TAGS, *SOLUTION_TAGS) for tag in pair}
THINKING_WORDS = "|".join(
    re.escape(tag[1:-1]) for tag, end in THINKING_TAGS if end == f"</{tag[1:]}"
)
THINKING_OPENING = re.compile(rf"<({THINKING_WORDS})\s*>", re.IGNORECASE)
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
# What it begins with is looked at first, since every character of every text is.
FOREIGN = re.compile(
    r"(?=[<\[◁✿>`])(?:<\|[a-zA-Z_/][\w/-]{1,40}\|>|</?(?:seed:)?think(?:ing)?>|◁/?think▷|\[/?INST\]"
    r"|</?(?:start|end)_of_turn>|<function=\w|</?tool_(?:call|code|response)>"
    r"|<｜[^｜\n]{1,40}｜>|</?function[_-]?calls?>|<invoke name=|</?minimax:\w+>|</?tool_use>"
    r"|<\|channel>|<SPECIAL_\d+>|<extra_id_\d+>|</?toolcalls?>|</?tool_calls>|</tool>|</?start_function_call>|<<functions?>>"
    r"|^>>>[\w.]+\n\{|✿[A-Z]+✿|</?use_mcp_tool>|^```tool_(?:call|code)|<eos>"
    r"|</s>\s*\Z)",
    re.IGNORECASE | re.MULTILINE,
)
FOREIGN_BEGINNING = re.compile(
    r"\[\w+(?:\.\w+)*\([^\n]*\)\]\s*\Z|\s*<(?:analysis|reason|reflection|plan)>|<s>"
    r"| ?analysis(?=[\s\S]*assistantfinal)",
    re.IGNORECASE,
)
FOREIGN_LINE = re.compile(r"^Action[ _]Input:|functools\[\{", re.IGNORECASE | re.MULTILINE)
CALL_TAGS = (
    ("<tool_call>", "</tool_call>"),
    ("<tool_calls>", "</tool_calls>"),
    ("<function_call>", "</function_call>"),
    ("<functioncall>", "</functioncall>"),
    ("<TOOLCALL>", "</TOOLCALL>"),
    ("<TOOL_CALL>", "</TOOL_CALL>"),
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
# Most answers have none of these, and are looked at no further.
SIGNS = ("<", "[", "◁", "&lt;")
WORDS = ("assistantfinal", "nput:", "✿", ">>>", "```tool")


def opening_of_template(text: str) -> str | None:
    """The markup that a text begins with if it was rendered for another model; None otherwise."""
    return next((opening for opening in TEMPLATES if text.startswith(opening)), None)


def foreign_tag(text: str) -> str | None:
    """Another model's markup in a text, in the words of a warning; None if there is none."""
    if not any(sign in text for sign in (*SIGNS, *WORDS)):
        return None  # as most texts: the search below looks at each of their characters
    match = FOREIGN_BEGINNING.match(text) or FOREIGN.search(text)
    if match is None and any(sign in text for sign in ("nput:", "functools[{")):
        match = FOREIGN_LINE.search(text)
    return match and match[0].strip()


def later_thinking(text: str) -> str | None:
    """A tag of thinking that is left in an answer, if it is one of a pair; None otherwise."""
    if "</" not in text:
        return None
    lower = text.lower()
    opened: dict[str, str] = {}
    for match in THINKING_OPENING.finditer(text):
        opened.setdefault(match[1].lower(), match[0])
    return next((tag for name, tag in opened.items() if f"</{name}" in lower), None)


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
        before = text.rstrip().removesuffix(end)
        is_all = is_absent(before) and not found
        if text.count(end) > 1 or is_all or not ends_an_answer(end, before):
            break
        found.append(f"`{end}` behind an answer left out")
        text = before.rstrip()
    return text


def ends_an_answer(end: str, before: str) -> bool:
    """Whether the token behind a text is another model's end, and not what the text is about.

    `</s>` closes an HTML tag too, and a sentence about such a token has a word and a space before.
    """
    if end == "</s>" and re.search(r"<s(?:\s[^<>]*)?>", before):
        return False
    return not re.search(r"[\w,:=(] +\Z", before)


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
            parts.append(Part("call", {"name": recipient, "arguments": content}, is_text=True))
        else:
            kinds = {"analysis": "thinking", "commentary": "preamble", "final": "final"}
            parts.append(Part(kinds[match["channel"]], content))
    return parts, ["`<|channel|>` read as harmony's messages"]


def thinking_tags_in(text: str) -> Iterator[tuple[str, str, list[Match], list[Match]]]:
    """Each pair of THINKING_TAGS of which a text has one, and where its two tags are."""
    lower = text.lower()
    for (opening, closing), (stem, closing_stem) in zip(THINKING_TAGS, STEMS, strict=True):
        if stem in lower or closing_stem in lower:
            begun = [*PATTERNS[opening].finditer(text)]
            ended = [*PATTERNS[closing].finditer(text)]
            if begun or ended:
                yield opening, closing, begun, ended


def split_thinking(text: str, found: list[str]) -> tuple[str, str]:
    """The thinking that a text begins with, and the text behind it."""
    body, lower = text.lstrip(), text.lower()
    for opening, closing, begun, ended in thinking_tags_in(body):
        if opening == "<think>" and "<think" not in lower and len(ended) == 1:
            begins = 0 if is_implied(body, ended[0]) else None
        else:
            begins = begun[0].end() if begun and begun[0].start() == 0 else None
        if begins is None:
            if not begun and "<think" not in lower:
                raise Unclear(f"`{closing}` inside its text, without `{opening}` before it")
            if opening in ("<think>", "[THINK]"):
                raise Unclear(f"`{opening}` behind the beginning of its text")
            continue
        if len(begun) > 1 or len(ended) != 1:
            raise Unclear(f"`{opening}` and `{closing}` that do not make one pair")
        found.append(f"`{opening.strip()}` read as thinking")
        thinking, answer = body[begins : ended[0].start()], body[ended[0].end() :]
        return thinking.strip(), unwrapped(answer)
    return "", text


def without_thinking_tags(text: str) -> tuple[str, list[str]]:
    """A thought without the tags of thinking and the tokens around all of it, and what was found.

    One tag of the two may be missing: the template writes it, or the thought was cut.
    """
    found: list[str] = []
    if not any(sign in text for sign in SIGNS):
        return text, found
    bare = without_frame(text, found).strip()
    match = HARMONY.fullmatch(bare)
    if match and match["channel"] == "analysis" and "<|" not in match["text"]:
        found.append("`<|channel|>analysis` around a thought left out")
        return match["text"].strip(), found
    for opening, _, begun, ended in thinking_tags_in(bare):
        begins = bool(begun) and begun[0].start() == 0
        ends = bool(ended) and ended[-1].end() == len(bare)
        if len(begun) == int(begins) and len(ended) == int(ends) and (begins or ends):
            found.append(f"`{opening.strip()}` around a thought left out")
            start, end = begun[0].end() if begins else 0, ended[0].start() if ends else len(bare)
            return bare[start:end].strip(), found
    return bare if found else text, found


def is_implied(text: str, closing: Match) -> bool:
    """Whether a `</think>` ends thinking without an opening tag, which R1's template writes.

    One in the middle of a line, or in a block of code, is what the text is about.
    """
    before, after = text[: closing.start()], text[closing.end() :]
    line_is_over = not after.split("\n", 1)[0].strip()
    return line_is_over and before.count("```") % 2 == 0


def unwrapped(answer: str) -> str:
    """The answer behind the thinking, without the tags that hold all of it."""
    bare = answer.strip()
    for opening, closing in SOLUTION_TAGS:
        begun, ended = PATTERNS[opening].match(bare), [*PATTERNS[closing].finditer(bare)]
        if begun and ended and ended[-1].end() == len(bare):
            inner = bare[begun.end() : ended[-1].start()]
            if not PATTERNS[opening].search(inner):
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
            parts += [Part("call", call, is_text=True) for call in calls_in(block, opening)]
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
        value = json.loads(block, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        if type(error) is ValueError:
            raise Unclear(f"`{opening}` before an object in which {error}") from None
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
