"""The flags of bench.py. Imports nothing heavy, so that its `--help` answers at once."""

from dataclasses import dataclass, field
from typing import Literal

from finetune.benchmark.variants import PATHS

# What --tiny takes for flags that are not given: two paths end within two minutes on two CPU cores.
TINY_DEFAULTS = {
    "max_length": 128,
    "per_device_train_batch_size": 2,
    "num_windows": 2,
    "steps_per_window": 2,
    "warmup_steps": 1,
}


def tiny_help(name: str, text: str = "") -> dict[str, str]:
    """The metadata of a flag whose default is smaller with --tiny."""
    return {"help": f"{text} With --tiny: {TINY_DEFAULTS[name]}.".strip()}


@dataclass
class BenchArguments:
    """What to measure, and for how long."""

    model: Literal["20b", "120b"] = "20b"
    num_layers: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Measure fewer layers than the model has; given two numbers, the figures are "
            "also scaled to all layers."
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "LoRA; false trains all weights."})
    max_length: int = field(default=4096, metadata=tiny_help("max_length", "Tokens of a row."))
    per_device_train_batch_size: int = field(
        default=4,
        metadata=tiny_help(
            "per_device_train_batch_size",
            "Rows a step: packed ones, or padded conversations where a path does not pack.",
        ),
    )
    num_windows: int = field(
        default=5, metadata=tiny_help("num_windows", "Figures are medians of this many windows.")
    )
    steps_per_window: int = field(default=4, metadata=tiny_help("steps_per_window"))
    warmup_steps: int = field(
        default=4, metadata=tiny_help("warmup_steps", "Steps before the first window.")
    )
    tiny: bool = field(
        default=False,
        metadata={"help": "Two small layers, short rows and few steps, for a try on a CPU."},
    )
    paths: list[str] = field(
        default_factory=lambda: ["recipe", "stock"], metadata={"help": " ".join(PATHS)}
    )
    save: bool = field(
        default=True,
        metadata={
            "help": "Whether to time a checkpoint. With --use_peft false it takes 12 bytes a "
            "parameter on the disk: 44 GB for three layers of 20b."
        },
    )
    trace: str | None = field(
        default=None, metadata={"help": "A folder for the profiler's traces."}
    )
    output: str | None = field(default=None, metadata={"help": "A file for the results as JSON."})

    @property
    def max_steps(self) -> int:
        return self.warmup_steps + self.num_windows * self.steps_per_window
