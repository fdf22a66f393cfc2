"""What a GPU can do at most, from NVIDIA's data sheets."""

from dataclasses import dataclass

from finetune.errors import UserError
from finetune.model.flops import PEAK_FLOPS

# The share of the data sheet's dense bf16 peak that large products reach within a card's power:
# 800 of H100's 989 TFLOP/s. An assumption, not measured here.
REACHED_FLOPS = 800 / 989
# What ring collectives reach of a link's bandwidth (all_gather_perf of nccl-tests): an assumption.
REACHED_LINKS = 0.8
NETWORK = 8 * 50e9  # bytes/s in each direction, of the eight 400 Gb/s cards of a node


@dataclass(frozen=True)
class Gpu:
    """memory: in bytes. bandwidth: of it, in bytes/s. nvlink: bytes/s in each direction."""

    name: str
    memory: float
    bandwidth: float
    nvlink: float

    @property
    def flops(self) -> float:
        """FLOP/s that dense bf16 products reach."""
        return PEAK_FLOPS[self.name] * REACHED_FLOPS


# The SXM parts.
GPUS = (
    Gpu("A100", memory=80e9, bandwidth=2.04e12, nvlink=300e9),
    Gpu("H100", memory=80e9, bandwidth=3.35e12, nvlink=450e9),
    Gpu("H200", memory=141e9, bandwidth=4.8e12, nvlink=450e9),
    Gpu("B200", memory=180e9, bandwidth=8e12, nvlink=900e9),
)


def gpu_named(accelerator: str) -> Gpu:
    """The GPU by its name in SkyPilot, for example H100 of H100-SXM.

    Raises UserError if its data sheet is not known here.
    """
    for gpu in GPUS:
        if gpu.name in accelerator:
            return gpu
    known = ", ".join(gpu.name for gpu in GPUS)
    raise UserError(f"the speed of {accelerator} is not known here, but of {known}")
