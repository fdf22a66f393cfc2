"""How much of an adapter a server applies, as told by what it answers.

The reference holds what the model says with half and with twice the adapter. Between these lies the
direction d in which a wrong scaling moves each log-probability: (double - half) / 1.5, in nats for
each 1 of scaling. What the server is off by, r, is projected on it:

    sum r d / sum d d        is about scaling - 1

Rounding moves log-probabilities in other directions and gives about 0. Those of one place vary
together, so the standard error is that of a ratio of sums over places (Cochran, Sampling
Techniques, 3rd edition, section 6.3).
"""

import math

from finetune.export.served_reference import Place

# Over all places llama.cpp (xllamacpp 2026.10.11549) was off by 0.001 with the adapter beside the
# base, and by 0.02 with experts that are MXFP4 again, both with the tiny model of the tests.
MOST_OFF = 0.1
MOST_ERRORS = 4  # standard errors; a right server stays below by chance
MIN_PLACES = 10  # fewer give no standard error to rely on


def scaling_problem(places: list[Place], served: list[dict[int, float]]) -> str | None:
    """A sentence if another share of the adapter is applied than all of it, or None.

    served: by place, the server's log-probabilities (nats) by token id.
    """
    sums = [sums_of(place, given) for place, given in zip(places, served, strict=True) if given]
    if len(sums) < MIN_PLACES or not any(square for _, square in sums):
        return None
    scaling, error = measured_scaling(sums)
    if abs(scaling - 1) < max(MOST_OFF, MOST_ERRORS * error):
        return None
    return (
        f"{scaling:.2f} of the adapter is applied ({scaling - 2 * error:.2f} to "
        f"{scaling + 2 * error:.2f}): it is scaled wrongly, or the format rounds a part of it away"
    )


def measured_scaling(sums: list[tuple[float, float]]) -> tuple[float, float]:
    """The scaling and its standard error. sums: of r d and of d d, of each place."""
    total = sum(square for _, square in sums)
    slope = sum(along for along, _ in sums) / total
    squares = sum((along - slope * square) ** 2 for along, square in sums)
    return 1 + slope, math.sqrt(squares * len(sums) / (len(sums) - 1)) / total


def sums_of(place: Place, given: dict[int, float]) -> tuple[float, float]:
    """The sums of r d and of d d over the tokens that both name; 0 of a run without an adapter."""
    models = place.log_probs
    along = square = 0.0
    if not {"half", "double"} <= models.keys():
        return along, square
    for index, token in enumerate(place.candidates):
        if token in given:
            direction = (models["double"][index] - models["half"][index]) / 1.5
            along += (given[token] - models["trained"][index]) * direction
            square += direction**2
    return along, square
