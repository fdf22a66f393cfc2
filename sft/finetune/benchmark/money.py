"""What a run adds to the bill before it is launched: checkpoints and interruptions."""

from dataclasses import dataclass
from typing import Any

from finetune.benchmark.traffic import Parameters

# Weights and AdamW's two states, in fp32; gradients are not saved.
BYTES_OF_A_CHECKPOINT_PER_PARAMETER = 12


@dataclass(frozen=True)
class Interruptions:
    """Of a spot machine. All in minutes: how often it is taken back, how long the next one takes
    until it trains, and how long training goes on between two checkpoints.
    """

    every: float
    startup: float
    between_saves: float

    def hours(self, training_hours: float) -> float:
        """What they add to so many hours of training.

        Each costs a start-up and, on average, half of the time between two checkpoints, which is
        trained again. (The first-order model of Young, "A first order approximation to the optimum
        checkpoint interval", 1974.)
        """
        lost = self.startup + self.between_saves / 2
        return training_hours * lost / self.every


def checkpoint_bytes(parameters: Parameters, *, lora: bool) -> int:
    """The size of one checkpoint of a run."""
    return BYTES_OF_A_CHECKPOINT_PER_PARAMETER * (parameters.adapter if lora else parameters.model)


def cheapest(offers: list[dict[str, Any]], dollars: str) -> dict[str, Any] | None:
    """The offer with the smallest number under this key, or None if no offer has one."""
    priced = [offer for offer in offers if offer[dollars] is not None]
    return min(priced, key=lambda offer: offer[dollars], default=None)
