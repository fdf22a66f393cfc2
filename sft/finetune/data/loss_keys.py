"""The keys that say whether a message is trained on: ms-swift's, axolotl's, OpenAI's, others'."""

from typing import Any

from finetune.data.findings import Findings
from finetune.data.shapes import Place
from finetune.data.values import Row, is_absent, parse_json

LOSS_KEYS = ("loss", "train", "training", "trainable", "loss_mask", "weight")
# Names that speak of the loss and mean different things to different programs.
UNCLEAR_LOSS_KEYS = {"train_detail", "train_on", "train_on_turn", "is_train", "trained", "learn"}
UNCLEAR_LOSS_KEYS |= {"compute_loss", "supervised", "mask", "masked", "ignore", "skip"}
UNCLEAR_LOSS_KEYS |= {
    "loss_weight",
    "loss_scale",
    "is_masked",
    "skip_loss",
    "no_loss",
    "ignore_loss",
}
UNCLEAR_LOSS_KEYS |= {"include_in_loss", "in_loss", "learnable", "is_trainable", "should_train"}
TRUE, FALSE = (True, 1, "1", "true", "1.0"), (False, 0, "0", "false", "0.0")


def truth_of(value: Any) -> bool | None:
    """What a value of LOSS_KEYS says; None if it is neither 0 nor 1."""
    if not isinstance(value, bool | int | float | str):
        return None
    value = value.strip().lower() if isinstance(value, str) else value
    return True if value in TRUE else False if value in FALSE else None


def is_in_loss(message: Row, where: str, findings: Findings) -> bool:
    """Whether the keys in LOSS_KEYS let a message into the loss."""
    answers = set()
    for key in LOSS_KEYS:
        value = message.get(key)
        if is_absent(value):
            continue
        answer = truth_of(value)
        if answer is None:
            findings.problems.append(f"{where} has {value!r} as `{key}`, not 0 or 1")
        answers.add(answer)
    if {True, False} <= answers:
        findings.problems.append(f"{where}: {', '.join(LOSS_KEYS)} contradict each other")
    for key in sorted(message.keys() & UNCLEAR_LOSS_KEYS):
        if not is_absent(message[key]):
            findings.problems.append(
                f"{where} has `{key}`: say by `weight`, 0 or 1, whether the message is learnt"
            )
    return False not in answers


def note_prompt_in_loss(message: Row, findings: Findings) -> None:
    """Tell of a prompt that a key lets into the loss, as axolotl's `train` can: it stays out."""
    for key in LOSS_KEYS:
        if not is_absent(message.get(key)) and truth_of(message[key]):
            findings.notes.append(
                f"`{key}` on a message that is not the assistant's has no effect: "
                "only what the model writes is learnt"
            )
            return


def with_row_loss(row: Row, places: list[Place], findings: Findings) -> list[Place]:
    """The messages, as far as a key of the row itself says that they are not in the loss.

    It holds 0 or 1 for all of them, or a list with as many. A number of another kind may well be a
    loss that was measured: such a key is one that is not read.
    """
    for key in LOSS_KEYS:
        value = parse_json(row.get(key))
        if is_absent(value):
            continue
        answers = [truth_of(item) for item in value] if isinstance(value, list) else []
        if isinstance(value, list) and len(answers) == len(places) and None not in answers:
            learnt = [bool(answer) for answer in answers]
        elif isinstance(value, list):
            findings.problems.append(
                f"`{key}` of the row is a list, but not of {len(places)} times 0 or 1: "
                "one for each message"
            )
            continue
        elif truth_of(value) is None:
            findings.unread.add(key)
            continue
        else:
            learnt = [bool(truth_of(value))] * len(places)
        if not all(learnt):
            findings.notes.append(f"`{key}` of the row leaves messages out of the loss")
        places = [
            place._replace(in_loss=place.in_loss and is_learnt)
            for place, is_learnt in zip(places, learnt, strict=True)
        ]
    return places
