"""Harmony read back from token ids: which channel a token is of, whether a generated turn is valid.

A turn is what follows `<|start|>assistant`, as a server has the model write it:

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
"""

import re
from dataclasses import dataclass, field
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from finetune.data.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, Encoder

CHANNELS = ("analysis", "commentary", "final")
NO_CHANNEL = "other"  # messages that have none, plain text, a header that was cut
RECIPIENT = r"( to=\S+)?"
ENDS = (END, CALL, RETURN)

# A control token, none before the first, and the text up to the next.
Part = tuple[str, str]


@dataclass
class Turn:
    """What was said on which channel, as far as it goes; problem: why it is not valid harmony."""

    said: list[tuple[str, str]] = field(default_factory=list)
    problem: str | None = None

    def text(self, channel: str) -> str:
        return "\n".join(text for name, text in self.said if name == channel)


class ChannelReader:
    """Reads ids of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        encoder = Encoder(tokenizer)
        self.tokenizer = tokenizer
        self.start, self.channel = encoder.ids[START], encoder.ids[CHANNEL]
        self.control = {number: token for token, number in tokenizer.get_added_vocab().items()}
        self.names = {
            name: encoder.text.encode(name, add_special_tokens=False).ids for name in CHANNELS
        }

    def channels(self, input_ids: list[int]) -> list[str]:
        """Of each token; a message's header and the token that ends it are of its channel."""
        starts = [number for number, token in enumerate(input_ids) if token == self.start]
        edges = [*([] if starts[:1] == [0] else [0]), *starts, len(input_ids)]
        named = []
        for first, after in pairwise(edges):
            message = input_ids[first:after]
            named += [self.channel_of(message)] * len(message)
        return named

    def channel_of(self, message: list[int]) -> str:
        if self.channel not in message:
            return NO_CHANNEL
        header = message[message.index(self.channel) + 1 :]
        names = [name for name, ids in self.names.items() if header[: len(ids)] == ids]
        return names[0] if names else NO_CHANNEL

    def read(self, turn: list[int], *, has_tools: bool) -> Turn:
        """A turn that was generated after `<|start|>assistant`.

        Valid: every header is whole, every message closed, and the turn ends in a final message
        that says something or, where there are tools, in a call of one.
        """
        messages: list[list[Part]] = []
        for part in self.parts(turn):
            if part[0] in ("", START):
                messages.append([])
            messages[-1].append(part)
        read = Turn([said for message in messages for said in channel_texts(message)])
        for number, message in enumerate(messages):
            is_last = number == len(messages) - 1
            read.problem = problem_of(
                message, is_first=number == 0, is_last=is_last, has_tools=has_tools
            )
            if read.problem is not None:
                break
        return read

    def parts(self, ids: list[int]) -> list[Part]:
        found = [number for number, token in enumerate(ids) if token in self.control]
        edges = [*found, len(ids)]
        parts = [("", self.tokenizer.decode(ids[: edges[0]], skip_special_tokens=False))]
        for first, after in pairwise(edges):
            text = self.tokenizer.decode(ids[first + 1 : after], skip_special_tokens=False)
            parts.append((self.control[ids[first]], text))
        return parts


def channel_texts(message: list[Part]) -> list[tuple[str, str]]:
    """(channel, text) of a message, whole or not."""
    texts = dict(reversed(message))
    name = texts.get(CHANNEL, "").split(" ")[0]
    return [(name, texts[MESSAGE])] if name in CHANNELS and MESSAGE in texts else []


def problem_of(
    message: list[Part], *, is_first: bool, is_last: bool, has_tools: bool
) -> str | None:
    """Why a message is not one that may stand there, or None."""
    controls = [control for control, _ in message]
    if controls[-1] not in ENDS:
        return "a message is not closed" if is_last else "a message begins in another"
    if controls[1:-1] not in ([CHANNEL, MESSAGE], [CHANNEL, CONSTRAIN, MESSAGE]):
        return f"a message is made of {' '.join(filter(None, controls))}"
    (_, author), (_, channel), *constrain, (_, content), (end, rest) = message
    author_match = re.fullmatch(("" if is_first else "assistant") + RECIPIENT, author)
    # The content's type, which a call may name, is a word or stands behind <|constrain|>.
    content_type = " ?" if constrain else r"( \w+)?"
    channel_match = re.fullmatch(rf"({'|'.join(CHANNELS)}){RECIPIENT}{content_type}", channel)
    if author_match is None or any(not re.fullmatch(r"\w+", text) for _, text in constrain):
        return "a header is malformed"
    if channel_match is None:
        return f"there is no channel {channel!r}"
    if rest:
        return "text stands outside of messages"
    is_call = bool(author_match[1] or channel_match[2])
    if not is_last:
        is_closed = end == END and not is_call and channel_match[1] != "final"
        return None if is_closed else "the turn goes on after its end"
    if is_call:
        return None if end == CALL and has_tools else "it calls a tool where there is none"
    is_answer = channel_match[1] == "final" and end == RETURN and content.strip()
    return None if is_answer else "it ends without a final answer"
