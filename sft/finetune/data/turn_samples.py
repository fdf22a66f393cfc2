"""A conversation as the samples in which each of its turns is learnt.

The server drops the thinking of earlier turns from its prompts (drop_past_analysis in harmony.py).
Of K turns with thinking, one sample can therefore hold that of the last turn alone. So a sample
ends wherever the next prompt lacks thinking that this one has: K turns with thinking make K
samples, each of which is the prompt that the server makes for a turn, followed by that turn.
"""

from itertools import pairwise
from typing import NamedTuple

from finetune.data.harmony import Message, drop_past_analysis, last_index, past_end
from finetune.data.options import TrainOn


class Sample(NamedTuple):
    """A part of a conversation, from its beginning on, without the thinking of earlier turns.

    first_learnt: the index of its first message that can be in the loss. What comes before is
    learnt in the samples before this one.
    """

    messages: list[Message]
    first_learnt: int = 0


def split_samples(messages: list[Message], train_on: TrainOn = "assistant") -> list[Sample]:
    """The samples in which all that is in the loss is learnt, each message in one of them.

    messages: all of a conversation, the thinking of every turn included. A turn without thinking is
    learnt together with the next one that has some, since their prompts agree. There is always a
    sample, even if nothing is in the loss.
    """
    learnt = [is_learnt(messages, number, train_on) for number in range(len(messages))]
    samples: list[Sample] = []
    first = 0
    for end, next_end in pairwise([*turn_ends(messages), None]):
        assert end is not None
        if next_end is not None:
            lost = lost_analysis(messages, end, next_end)
            if lost is None or not any(learnt[max(first, lost) : end]):
                continue  # the next prompt agrees with this one in all that is learnt here
        if any(learnt[first:end]) or not (samples or next_end):
            kept = drop_past_analysis(messages[:end])
            samples.append(Sample(kept, first_learnt=len(kept) - count_kept(messages, first, end)))
        first = end
    return samples


def turn_ends(messages: list[Message]) -> list[int]:
    """Where each turn ends: at the next user's message, or at the end of the conversation."""
    ends = [
        number
        for number, (before, message) in enumerate(pairwise(messages), start=1)
        if message.author == "user" and before.author != "user"
    ]
    return [*ends, len(messages)]


def lost_analysis(messages: list[Message], end: int, next_end: int) -> int | None:
    """The index of the first thinking that the prompt up to `end` has and the next one has not."""
    before, after = past_end(messages[:end]), past_end(messages[:next_end])
    lost = [n for n in range(before, after) if messages[n].channel == "analysis"]
    return lost[0] if lost else None


def count_kept(messages: list[Message], first: int, end: int) -> int:
    """How many messages from `first` on are left in the sample that ends at `end`."""
    past = past_end(messages[:end])
    return sum(n >= past or messages[n].channel != "analysis" for n in range(first, end))


def is_learnt(messages: list[Message], number: int, train_on: TrainOn) -> bool:
    """Whether a message is in the loss, in part at least. See to_pieces for the rule."""
    message = messages[number]
    if train_on == "everything":
        return True
    if train_on == "last_turn" and number < last_index(messages, author="user"):
        return False
    return message.author == "assistant" and message.in_loss
