"""train.py, in which the memory of the last rank's GPU fails: a trained weight becomes NaN there.

accelerate launch --config_file sft/ddp.yaml tests/helpers/memory_fault.py FLAGS-OF-train.py

It happens before the third step. In data parallel no other rank's weights are touched.
"""

import runpy
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerState, trainer

from helpers.paths import REPO

GOOD_STEPS = 2


class MemoryFault(TrainerCallback):
    def on_step_begin(
        self, args: Any, state: TrainerState, control: Any, model: torch.nn.Module, **kwargs: Any
    ) -> None:
        if state.global_step == GOOD_STEPS and PartialState().is_last_process:
            trained = next(weight for weight in model.parameters() if weight.requires_grad)
            trained.data[0] = float("nan")


if __name__ == "__main__":
    trainer.DEFAULT_CALLBACKS.append(MemoryFault)
    runpy.run_path(str(REPO / "sft/train.py"), run_name="__main__")
