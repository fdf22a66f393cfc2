"""What the trained model and the base predict at some places of a run's conversations.

It is computed once, with the models in memory, and kept in the run's folder. Then a server can be
compared with it from anywhere.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.checkpoint.fingerprint import folder_hash
from finetune.errors import only_warn
from finetune.export.divergence import Logits, Rows
from finetune.export.fidelity import reference_logits
from finetune.export.merge import MergedWeights

FILE = "served_reference.json"
# How many of either model's likeliest tokens are kept. A server names 20; another model's differ.
NUM_CANDIDATES = 256


@dataclass
class Place:
    """A prompt, and log-probabilities (nats) of tokens that may follow it.

    tokens: of the prompt; candidates: the likeliest next tokens of either model; log_probs: of the
    candidates, by model: "trained", "base" and, of an adapter, what a server would make of it that
    applies it wrongly: "without_experts", "half", "double".
    """

    tokens: list[int]
    candidates: list[int]
    log_probs: dict[str, list[float]]


@dataclass
class Reference:
    """identity: of the weights that were trained, and of the base (see identity_of)."""

    identity: dict[str, Any]
    places: list[Place]


def identity_of(merged: MergedWeights, *, num_examples: int, num_places: int) -> dict[str, Any]:
    """What decides whether a kept reference can be used again."""
    run = merged.run_weights
    values = {"origin": run.origin, "step": run.step, "run": run.record.identity()}
    values["weights_sha256"] = run.weights_sha256
    values["base_hash"] = folder_hash(merged.base.folder)
    return values | {"num_examples": num_examples, "num_places": num_places}


def read_reference(folder: Path, identity: dict[str, Any]) -> Reference | None:
    """The reference kept in a run's folder; None if there is none, or if it is of other weights."""
    try:
        values = json.loads((folder / FILE).read_text())
        places = [Place(**place) for place in values["places"]]
        is_whole = places and all(map(is_complete, places))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not is_whole:
        return None
    same = values.get("identity") == json.loads(json.dumps(identity))
    return Reference(identity, places) if same else None


def is_complete(place: Place) -> bool:
    """Whether each model has a log-probability of every candidate."""
    numbers = [len(values) for values in place.log_probs.values()]
    return {"trained", "base"} <= place.log_probs.keys() and set(numbers) == {len(place.candidates)}


def make_reference(
    merged: MergedWeights, rows: Rows, identity: dict[str, Any], *, num_places: int
) -> Reference:
    """Run the models on the conversations, one model at a time in memory."""
    logits = reference_logits(merged, rows, scalings={"half": 0.5, "double": 2.0})
    places = [
        place_at(logits, rows, row, position)
        for row, position in spread(learnt_positions(rows), num_places)
    ]
    return Reference(identity, places)


def keep(reference: Reference, folder: Path) -> None:
    """Write it to the run's folder; a folder that cannot be written costs a warning."""
    with only_warn(f"the reference is not kept in {folder}"):
        (folder / FILE).write_text(json.dumps(asdict(reference)))


def learnt_positions(rows: Rows) -> list[tuple[int, int]]:
    """Where the next token is in the loss: (row, the position before it)."""
    return [
        (row, position - 1)
        for row, values in enumerate(rows)
        for position, label in enumerate(values["labels"])
        if label != -100 and position > 0
    ]


def spread(positions: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """At most `count` of the positions, evenly spread."""
    step = max(1, len(positions) // count)
    return positions[::step][:count]


def place_at(logits: dict[str, Logits], rows: Rows, row: int, position: int) -> Place:
    predicted = {name: of_rows[row][position].log_softmax(-1) for name, of_rows in logits.items()}
    size = min(NUM_CANDIDATES, len(predicted["trained"]))
    likeliest = [predicted[name].topk(size).indices for name in ("trained", "base")]
    candidates = torch.cat(likeliest).unique()
    return Place(
        tokens=rows[row]["input_ids"][: position + 1],
        candidates=candidates.tolist(),
        log_probs={name: values[candidates].tolist() for name, values in predicted.items()},
    )
