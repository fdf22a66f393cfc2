"""Conversations in OpenAI's harmony format, token for token, and which of the tokens are learnt.

The format is that of openai-harmony 0.0.8, the renderer that vLLM serves gpt-oss with: a message is
encoded piece by piece, control tokens by their ids, all else as text, so that a `<|start|>` that a
user wrote stays text. Where the published checkpoints' chat template differs, the renderer wins:

    template                                          here, as openai-harmony renders it
    a blank line ends the developer message           none
    tools: some schemas as `any` or `object`          harmony's TypeScript (typescript.py)
    tool calls: `json`, one a message                 `<|constrain|>json`, all of them
    tool results, and arguments that are text: JSON   as they are
    with a tool call, content counts as analysis      analysis, then content as a preamble
    only the first message may instruct               every system or developer message does

vLLM (at commit 6a22fe6, harmony_utils.py) gives the renderer other messages than its default or
OpenAI's documentation of the format has:

    vLLM sends                                        here
    no analysis before the last final message         the same, as the model reads just that. The
                                                      renderer's default drops only what precedes
                                                      the first (openai/harmony#96), which differs
                                                      from a third user's turn on
    earlier calls: `json` without `<|constrain|>`     with it: the model writes its calls itself,
                                                      and vLLM calls this the official form
    earlier calls: the preamble, then analysis        analysis first, as the model writes it
    channels without `commentary` if without tools    all three, the renderer's default

What is learnt is what the model writes when it is served. One thing is not: the header of a message
whose turn has shown no analysis before it, whatever its channel. The data has none, or it was
dropped with the turn's end; to learn ` to=functions.add` or `<|channel|>final` there is to learn
not to think. Its content and its end are learnt, and with learn_no_thinking the header is too. A
turn is all that the assistant says, with its tools' results, until a user speaks. Once it has shown
analysis, it shows where the model thinks and where it goes on: there a preamble, a call or an
answer without analysis of its own, directly or after a tool's result, is learnt whole. A turn that
shows none says nothing of either, so none of its headers is.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from finetune.data.options import TrainOn
from finetune.data.tool_schema import tools_section
from finetune.errors import UserError

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"
VALID_CHANNELS = (
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
CALLS_GO_TO = "Calls to these tools must go to the commentary channel: 'functions'."
START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN, END_OF_TEXT = "<|end|>", "<|call|>", "<|return|>", "<|endoftext|>"
CONTROL_TOKENS = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN, END_OF_TEXT)


class Piece(NamedTuple):
    """What is encoded at once: a control token, or text in which control tokens are only text."""

    text: str
    is_control: bool
    in_loss: bool


@dataclass
class Message:
    """One message of harmony. author: a role, or a tool's `functions.NAME`."""

    author: str
    content: str
    channel: str | None = None
    recipient: str | None = None
    constrain: str | None = None  # the content's type
    in_loss: bool = True  # if it is the assistant's

    @property
    def is_call(self) -> bool:
        return self.author == "assistant" and self.recipient is not None


def to_messages(conversation: dict[str, Any], *, date: str, reasoning_effort: str) -> list[Message]:
    """The messages of a conversation as conversations.py gives it, the system's first.

    date: that the model is told, as YYYY-MM-DD. reasoning_effort: unless the conversation has one.
    """
    tools = conversation.get("tools") or []
    effort = conversation.get("reasoning_effort") or reasoning_effort
    system = f"{IDENTITY}\nKnowledge cutoff: {KNOWLEDGE_CUTOFF}\nCurrent date: {date}\n\n"
    system += f"Reasoning: {effort}\n\n{VALID_CHANNELS}" + (f"\n{CALLS_GO_TO}" if tools else "")
    messages = [Message("system", system)]
    turns = conversation["messages"]
    instructs = bool(turns) and turns[0]["role"] in ("system", "developer")
    if tools and not instructs:
        messages.append(Message("developer", tools_section(tools)))
    for number, turn in enumerate(turns):
        if turn["role"] in ("system", "developer"):
            sections = ["# Instructions", turn["content"]]
            sections += [tools_section(tools)] if tools and number == 0 else []
            messages.append(Message("developer", "\n\n".join(sections)))
        elif turn["role"] == "assistant":
            messages += assistant_messages(turn)
        elif turn["role"] == "tool":
            author = f"functions.{turn['name']}"
            messages.append(Message(author, turn["content"], "commentary", "assistant"))
        else:
            messages.append(Message("user", turn["content"]))
    return drop_past_analysis(messages)


def assistant_messages(turn: dict[str, Any]) -> list[Message]:
    """Analysis, then a final message; or analysis, a preamble and tool calls."""
    calls = turn.get("tool_calls") or []
    learnt = turn.get("in_loss", True)
    messages = []
    if turn.get("thinking"):
        messages.append(Message("assistant", turn["thinking"], "analysis", in_loss=learnt))
    if turn.get("content"):
        channel = "commentary" if calls else "final"
        messages.append(Message("assistant", turn["content"], channel, in_loss=learnt))
    for call in calls:
        recipient = f"functions.{call['name']}"
        arguments = call["arguments"]
        messages.append(
            Message("assistant", arguments, "commentary", recipient, "json", in_loss=learnt)
        )
    return messages


def drop_past_analysis(messages: list[Message]) -> list[Message]:
    """Drop the analysis before the last final message that a user has answered: all that vLLM drops
    of the prompt that it makes for the last turn.
    """
    last_user = last_index(messages, author="user")
    last_final = last_index(messages[: max(last_user, 0)], channel="final")
    return [m for n, m in enumerate(messages) if m.channel != "analysis" or n > last_final]


def last_index(messages: list[Message], **fields: str) -> int:
    """Of the last message with these fields; -1 if there is none."""
    found = [
        number
        for number, message in enumerate(messages)
        if all(getattr(message, name) == value for name, value in fields.items())
    ]
    return found[-1] if found else -1


def to_pieces(
    messages: list[Message], train_on: TrainOn = "assistant", *, learn_no_thinking: bool = False
) -> list[Piece]:
    """What is encoded, in order, and what is in the loss.

    By default the loss is of what the model writes when it is served. The server writes the header
    `<|start|>assistant` that opens a turn, and goes on after a tool's result; the model writes the
    one between its own messages. The rest of a header, through `<|message|>`, is learnt only where
    its turn has shown analysis (see above); learn_no_thinking: everywhere.
    """
    last_user = last_index(messages, author="user")
    pieces: list[Piece] = []
    thought = False
    for number, message in enumerate(messages):
        before = messages[number - 1] if number else None
        goes_on = before is not None and before.author == "assistant" and not before.is_call
        thought = message.author != "user" and (thought or message.channel == "analysis")
        everything = train_on == "everything"
        said = message.author == "assistant" and message.in_loss
        said = said and (train_on != "last_turn" or number > last_user)
        pieces += pieces_of(
            message,
            ends_all=number == len(messages) - 1 and message.channel == "final",
            start_in_loss=everything or (said and goes_on),
            header_in_loss=everything or (said and (thought or learn_no_thinking)),
            content_in_loss=everything or said,
        )
    return pieces


def pieces_of(
    message: Message,
    *,
    ends_all: bool,
    start_in_loss: bool,
    header_in_loss: bool,
    content_in_loss: bool,
) -> list[Piece]:
    start = [(START, True), (message.author, False)]
    header = []
    if message.recipient is not None:
        header.append((f" to={message.recipient}", False))
    if message.channel is not None:
        header += [(CHANNEL, True), (message.channel, False)]
    if message.constrain is not None:
        header += [(" ", False), (CONSTRAIN, True), (message.constrain, False)]
    header.append((MESSAGE, True))
    end = RETURN if ends_all else CALL if message.is_call else END
    return [
        *(Piece(text, is_control, start_in_loss) for text, is_control in start),
        *(Piece(text, is_control, header_in_loss) for text, is_control in header),
        Piece(message.content, False, content_in_loss),
        Piece(end, True, content_in_loss),
    ]


def document_pieces(text: str) -> list[Piece]:
    """Of plain text, which is no conversation: all of it is learnt, and where it ends."""
    return [Piece(text, False, True), Piece(END_OF_TEXT, True, True)]


class Encoder:
    """Turns pieces into ids by a tokenizer's vocabulary; its chat template stays unused."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.ids = {token: tokenizer.get_vocab().get(token) for token in CONTROL_TOKENS}
        missing = [token for token, number in self.ids.items() if number is None]
        if missing:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path!r} is none of gpt-oss's: "
                f"it lacks {', '.join(missing)}"
            )
        self.text = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.text.encode_special_tokens = True

    def encode(self, conversations: list[list[Piece]]) -> tuple[list[list[int]], list[list[int]]]:
        """input_ids and labels (-100 = not in the loss) of each; on all cores."""
        texts = {p.text for pieces in conversations for p in pieces if not p.is_control and p.text}
        unique = sorted(texts)
        encodings = self.text.encode_batch_fast(unique, add_special_tokens=False)
        ids_of = dict(zip(unique, (encoding.ids for encoding in encodings), strict=True)) | {"": []}
        input_ids, labels = [], []
        for pieces in conversations:
            parts = [[self.ids[p.text]] if p.is_control else ids_of[p.text] for p in pieces]
            input_ids.append([number for part in parts for number in part])
            learnt = [
                part if piece.in_loss else [-100] * len(part)
                for piece, part in zip(pieces, parts, strict=True)
            ]
            labels.append([number for part in learnt for number in part])
        return input_ids, labels
