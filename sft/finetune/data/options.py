"""How conversations are rendered, and which of their tokens are in the loss."""

from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from finetune.errors import UserError

TrainOn = Literal["assistant", "last_turn", "everything"]


@dataclass(frozen=True)
class DataArguments:
    """The flags that decide what a dataset's rows become."""

    train_on: TrainOn = field(
        default="assistant",
        metadata={"help": "What is in the loss: the assistant's turns, its last one, everything."},
    )
    learn_no_thinking: bool = field(
        default=False,
        metadata={"help": "Learn to answer without thinking where the data has no thinking."},
    )
    reasoning_effort: Literal["low", "medium", "high"] = field(
        default="medium",
        metadata={"help": "Of conversations without a `reasoning_effort` of their own."},
    )
    conversation_start_date: str = field(
        default="",
        metadata={"help": "The date the model is told; by default that of the first launch."},
    )
    truncate: bool = field(
        default=False,
        metadata={"help": "Cut conversations at --max_length instead of leaving them out."},
    )
    test_split_size: float = field(
        default=0.0,
        metadata={"help": "The share to hold out for evaluation (with --eval_strategy)."},
    )


def check_data_arguments(data: DataArguments) -> None:
    """Raise UserError for values out of range."""
    if not 0 <= data.test_split_size < 1:
        raise UserError("--test_split_size is a share: at least 0, less than 1")
    try:
        date.fromisoformat(data.conversation_start_date or "2026-01-02")
    except ValueError:
        raise UserError("--conversation_start_date is a date like 2026-01-02") from None
