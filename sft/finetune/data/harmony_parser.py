"""Reads harmony back from token ids: the channel of each token, and whether a turn is valid.

A turn is what the model writes after `<|start|>assistant`, which the server has written:

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
"""

import re
from dataclasses import dataclass, field
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from finetune.data.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, Encoder

CHANNELS = ("analysis", "commentary", "final")
NO_CHANNEL = "other"  # of system and user messages, of plain text, and of a header that was cut
RECIPIENT = r"( to=\S+)?"
ENDS = (END, CALL, RETURN)

# A control token and the text between it and the next one. The first part of a turn has the empty
# string in the place of the control token, because a turn begins inside a header.
Part = tuple[str, str]


@dataclass
class Turn:
    """A turn that was read. texts: (channel, text) of each message that has got as far as its text.

    problem: why the turn is not valid harmony; None if it is valid.
    """

    texts: list[tuple[str, str]] = field(default_factory=list)
    problem: str | None = None

    def text(self, channel: str) -> str:
        """All the text on one channel."""
        return "\n".join(text for name, text in self.texts if name == channel)


class ChannelReader:
    """Reads the token ids of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        encoder = Encoder(tokenizer)
        self.tokenizer = tokenizer
        self.start, self.channel = encoder.ids[START], encoder.ids[CHANNEL]
        self.control = {number: token for token, number in tokenizer.get_added_vocab().items()}
        ids = encoder.text_tokens.encode(list(CHANNELS))
        self.channel_ids = dict(zip(CHANNELS, ids, strict=True))

    def channels(self, input_ids: list[int]) -> list[str]:
        """The channel of each token, or NO_CHANNEL.

        The header of a message and the token that ends it count as the channel of the message.
        """
        starts = [number for number, token in enumerate(input_ids) if token == self.start]
        if starts[:1] != [0]:
            starts.insert(0, 0)  # the ids begin in the middle of a message
        channels = []
        for first, after in pairwise([*starts, len(input_ids)]):
            message = input_ids[first:after]
            channels += [self.channel_of(message)] * len(message)
        return channels

    def channel_of(self, message: list[int]) -> str:
        """The channel that the ids of a message name, or NO_CHANNEL."""
        if self.channel not in message:
            return NO_CHANNEL
        header = message[message.index(self.channel) + 1 :]
        for name, ids in self.channel_ids.items():
            if header[: len(ids)] == ids:
                return name
        return NO_CHANNEL

    def read(self, turn: list[int], *, has_tools: bool) -> Turn:
        """Read the ids that were generated after `<|start|>assistant`.

        A turn is valid if every header is complete, every message is closed, and the last message
        is a final message that is not blank or, if there are tools, a call of one.
        """
        messages: list[list[Part]] = []
        for part in self.parts(turn):
            if part[0] in ("", START):
                messages.append([])
            messages[-1].append(part)
        texts = [text for message in messages for text in channel_texts(message)]
        for number, message in enumerate(messages):
            problem = message_problem(
                message,
                is_first=number == 0,
                is_last=number == len(messages) - 1,
                has_tools=has_tools,
            )
            if problem is not None:
                return Turn(texts, problem)
        return Turn(texts)

    def parts(self, ids: list[int]) -> list[Part]:
        """The ids split at their control tokens."""
        controls = [number for number, token in enumerate(ids) if token in self.control]
        edges = [*controls, len(ids)]
        parts = [("", self.tokenizer.decode(ids[: edges[0]], skip_special_tokens=False))]
        for first, after in pairwise(edges):
            text = self.tokenizer.decode(ids[first + 1 : after], skip_special_tokens=False)
            parts.append((self.control[ids[first]], text))
        return parts


def channel_texts(message: list[Part]) -> list[tuple[str, str]]:
    """[(channel, text)] of a message, which may be cut short; [] if it has no channel or text."""
    header, text = text_after(message, CHANNEL), text_after(message, MESSAGE)
    if header is None or text is None:
        return []
    channel = header.split(" ")[0]
    return [(channel, text)] if channel in CHANNELS else []


def text_after(message: list[Part], control: str) -> str | None:
    """The text after the first of these control tokens; None if the message has none."""
    return next((text for token, text in message if token == control), None)


def message_problem(
    message: list[Part], *, is_first: bool, is_last: bool, has_tools: bool
) -> str | None:
    """Why a message is not valid in its place; None if it is valid."""
    controls = [control for control, _ in message]
    if controls[-1] not in ENDS:
        return "a message is not closed" if is_last else "a message begins inside another"
    if controls[1:-1] not in ([CHANNEL, MESSAGE], [CHANNEL, CONSTRAIN, MESSAGE]):
        return f"a message is made of {' '.join(filter(None, controls))}"
    # The lines above leave these parts, with or without the one after <|constrain|>.
    (_, author), (_, channel), *constrain, (_, content), (end, rest) = message
    author_match = re.fullmatch(("" if is_first else "assistant") + RECIPIENT, author)
    # A call may name the type of its content as a word after the channel or after <|constrain|>.
    content_type = " ?" if constrain else r"( \w+)?"
    channel_match = re.fullmatch(rf"({'|'.join(CHANNELS)}){RECIPIENT}{content_type}", channel)
    if author_match is None or any(not re.fullmatch(r"\w+", text) for _, text in constrain):
        return "a header is malformed"
    if channel_match is None:
        return f"there is no channel {channel!r}"
    if rest:
        return "there is text outside of messages"
    # The recipient stands before the channel or after it: the model writes either, never both.
    if author_match[1] and channel_match[2]:
        return "a header names two recipients"
    is_call = bool(author_match[1] or channel_match[2])
    is_final = channel_match[1] == "final"
    if not is_last:
        goes_on = end == END and not is_call and not is_final
        return None if goes_on else "the turn goes on after its end"
    if is_call:
        is_valid_call = end == CALL and has_tools
        return None if is_valid_call else "it calls a tool where there is none"
    is_answer = is_final and end == RETURN and content.strip()
    return None if is_answer else "it ends without a final answer"
