"""Which model answers: the trained one, the base, or something else.

At each place of a reference the server's log-probabilities are compared with those of the trained
model, of the base, and of what wrong ways to serve an adapter make of it, over the tokens that all
of them name. Distances are root mean squares, in nats.
"""

from dataclasses import dataclass

import torch

from finetune.export.served_reference import Place
from finetune.export.served_scaling import scaling_problem

# A correct engine is closer to the trained model than this share of what training changed. The
# distance of llama.cpp, which rounds to 8 bits and bf16, is under 0.01 of it on the tiny model.
CLOSE = 0.25
MIN_EFFECT = 0.01  # nats; where training changed less, an engine's rounding hides it
MIN_VALUES = 40  # of log-probabilities compared; fewer say nothing
MIN_ANSWERED = 0.25  # of the places; the rest may be longer than the server's context
MIN_VALUES_OF_PLACE, MIN_EFFECT_OF_PLACE = 5, 0.1  # of a place that is judged by itself
WRONG = {
    "base": "the base answers: what was trained is not applied",
    "without_experts": "the adapter is applied without its experts",
    "half": "the adapter is scaled wrongly: what answers is closest to half of it",
    "double": "the adapter is scaled wrongly: what answers is closest to twice of it",
}


@dataclass
class Verdict:
    """ok: whether the trained model answers; None if that cannot be told. text: a sentence."""

    ok: bool | None
    text: str
    rows: dict[str, float | int]


@dataclass
class Compared:
    """Log-probabilities of the same tokens by the server and by each model of the reference."""

    server: torch.Tensor
    models: dict[str, torch.Tensor]


def align(places: list[Place], served: list[dict[int, float]]) -> Compared:
    """Put side by side what both name. served: by place, the server's log-probabilities by token
    id.
    """
    server: list[float] = []
    models: dict[str, list[float]] = {name: [] for name in places[0].log_probs}
    for place, given in zip(places, served, strict=True):
        for index, token in enumerate(place.candidates):
            if token in given:
                server.append(given[token])
                for name, values in models.items():
                    values.append(place.log_probs[name][index])
    tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in models.items()}
    return Compared(torch.tensor(server, dtype=torch.float64), tensors)


def judge_places(
    places: list[Place], served: list[dict[int, float]], *, max_error: float | None
) -> Verdict:
    """As judge, of all places together; then by how many the base answers, or nobody, and by how
    much of an adapter is applied.
    """
    verdict = judge(align(places, served), max_error=max_error)
    num_of_base, num_answered = places_of_base(places, served), sum(map(bool, served))
    if num_of_base > 1 and verdict.text not in WRONG.values():
        text = (
            f"the base answers at {num_of_base} of {len(places)} places: one of several replicas?"
        )
        return Verdict(False, text, verdict.rows)
    if verdict.ok and num_answered < MIN_ANSWERED * len(places):
        text = f"cannot be told: the server answers at {num_answered} of {len(places)} places"
        return Verdict(None, text, verdict.rows)
    problem = scaling_problem(places, served) if verdict.ok else None
    return verdict if problem is None else Verdict(False, problem, verdict.rows)


def places_of_base(places: list[Place], served: list[dict[int, float]]) -> int:
    """At how many places the base answers, although training changed what follows there.

    The distance over all places hides a few of them: those that one of several replicas answers.
    """
    number = 0
    for place, given in zip(places, served, strict=True):
        here = align([place], [given])
        if len(here.server) >= MIN_VALUES_OF_PLACE:
            change = rms(here.models["trained"] - here.models["base"])
            is_base = rms(here.server - here.models["base"]) < change / 4
            number += change > MIN_EFFECT_OF_PLACE and is_base
    return number


def rms(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt())


def judge(compared: Compared, *, max_error: float | None = None) -> Verdict:
    """max_error: the distance from the trained model (nats) that the server's format may add; None
    if nothing is stated.
    """
    if len(compared.server) == 0:
        return Verdict(
            None,
            "the server gives no log-probabilities at /v1/completions: start it so that it does, "
            "or ask another server of the same files",
            {},
        )
    if len(compared.server) < MIN_VALUES:
        return Verdict(None, "the server names too few of the tokens that were compared", {})
    trained = compared.models["trained"]
    distances = {name: rms(compared.server - m) for name, m in compared.models.items()}
    changes = {name: rms(trained - m) for name, m in compared.models.items()}
    rows: dict[str, float | int] = {
        "log-probabilities compared": len(compared.server),
        "distance from the trained model": distances["trained"],
        "distance from the base": distances["base"],
        "what training changed": changes["base"],
    }
    ok, text = sentence(distances, changes, max_error=max_error)
    return Verdict(ok, text, rows)


def sentence(
    distances: dict[str, float], changes: dict[str, float], *, max_error: float | None
) -> tuple[bool | None, str]:
    """Whether the trained model answers, and why.

    distances: of the server from each model; changes: of the trained model from each.
    """
    error, effect = distances["trained"], changes["base"]
    nearest = min(distances, key=lambda name: distances[name])
    if effect < MIN_EFFECT:
        return None, f"training changed too little to tell the models apart: {effect:.4f} nats"
    if nearest != "trained" and distances[nearest] < changes[nearest] / 2:
        return False, WRONG[nearest]
    if error > effect and distances["base"] > effect:
        return False, (
            "neither the trained model nor its base answers: another base model, or the adapter "
            "of another run"
        )
    if not error <= CLOSE * effect:  # also if it is not a number
        return False, (
            f"what answers is {error:.4f} nats from the trained model, and training changed "
            f"{effect:.4f}: the adapter of another run, or quantised too far"
        )
    if max_error is not None and error > max_error:
        return False, (
            f"quantised too far: {error:.4f} nats from the trained model, more than the "
            f"{max_error} that were stated"
        )
    return True, "served as trained"
