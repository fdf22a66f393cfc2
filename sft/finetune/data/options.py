"""The flags that say how conversations are rendered and which of their tokens are in the loss."""

from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from finetune.errors import UserError

TrainOn = Literal["assistant", "last_turn", "everything"]


@dataclass(frozen=True)
class DataArguments:
    """How the rows of a dataset become tokens and labels."""

    train_on: TrainOn = field(
        default="assistant",
        metadata={
            "help": "Which tokens are in the loss: those of all assistant turns (assistant), of "
            "the last one only (last_turn), or all tokens (everything)."
        },
    )
    learn_no_thinking: bool = field(
        default=False,
        metadata={
            "help": "Also train on the choice not to think, in turns without any thinking. This "
            "teaches the model to answer without thinking."
        },
    )
    learn_past_thinking: bool = field(
        default=True,
        metadata={
            "help": "Learn the thinking of every turn: a conversation becomes a sample for each "
            "turn whose thinking the server drops from later prompts. With false it is one "
            "sample, and of its thinking only that of the last turn is learnt."
        },
    )
    reasoning_effort: Literal["low", "medium", "high"] = field(
        default="medium",
        metadata={
            "help": "The reasoning effort in the system message of conversations that have no "
            "`reasoning_effort` of their own."
        },
    )
    conversation_start_date: str = field(
        default="",
        metadata={
            "help": "The current date in the system message, as YYYY-MM-DD. If empty, it is the "
            "date of the run's first launch."
        },
    )
    truncate: bool = field(
        default=False,
        metadata={
            "help": "Cut conversations that are longer than --max_length, instead of leaving them "
            "out."
        },
    )
    skip_bad_rows: bool = field(
        default=False,
        metadata={
            "help": "Leave out the rows that cannot be read, and name them, instead of refusing "
            "the whole dataset."
        },
    )
    test_split_size: float = field(
        default=0.0,
        metadata={
            "help": "The share of the conversations, from 0 to 1, to hold out for evaluation. It "
            "has an effect only together with --eval_strategy."
        },
    )


@dataclass(frozen=True)
class EarlierDataArguments(DataArguments):
    """The flags of a run begun under training rules 1 or 2, which goes on by them.

    A conversation is one sample; the recipient of a call stands before the channel; in a turn
    without thinking all of the header is left out of the loss; and a final answer that later turns
    follow is learnt with the `<|end|>` that it has there.
    """

    learn_past_thinking: bool = False


def check_data_arguments(data: DataArguments) -> None:
    """Raise UserError for values out of range."""
    if not 0 <= data.test_split_size < 1:
        raise UserError("--test_split_size is a share: it must be at least 0 and less than 1")
    try:
        date.fromisoformat(data.conversation_start_date or "2026-01-02")
    except ValueError:
        raise UserError("--conversation_start_date must be a date like 2026-01-02") from None
