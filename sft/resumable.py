"""SFTTrainer whose checkpoints are saved in the background and resumed on any number of ranks."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from transformers import TrainerCallback, TrainerState
from trl import SFTTrainer

from saver import Saver
from weights import Checkpoint, shard_and_fill

# A LoRA checkpoint holds the adapter, not the frozen base.
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


class ResumableSFTTrainer(SFTTrainer):
    """Weights and optimizer go through torch DCP; what is small, Trainer's own way.

    DeepSpeed keeps its own format, saved while training waits.
    """

    def __init__(
        self, *args: Any, saver: Saver, weights: Checkpoint | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.saver = saver
        self.weights = weights
        self.args.save_total_limit = None  # the saver deletes, once the next is durable
        self.add_callback(saver)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Of parameters where they will be trained: a model on the meta device is sharded first."""
        if self.weights is not None and next(self.model.parameters()).is_meta:
            shard_and_fill(self.accelerator, self.model, self.weights)
        return super().create_optimizer(*args, **kwargs)

    def state_to_save(self) -> dict[str, Any]:
        weights, optimizer = get_state_dict(
            self.model_wrapped, self.optimizer.optimizer, options=OPTIONS
        )
        return {"model": weights, "optimizer": optimizer}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        if self.is_deepspeed_enabled:
            stock = super()._save_checkpoint
            self.saver.save(step, None, lambda folder: stock(model, trial))
            return
        self.store_flos()
        self.saver.save(step, self.state_to_save(), self.write_small_files)

    def write_small_files(self, folder: Path) -> None:
        self._save_rng_state(str(folder))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: weights come with the optimizer's states, once both are laid out."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state_dict = self.state_to_save()
        dcp.load(state_dict, checkpoint_id=checkpoint)
        set_state_dict(
            self.model_wrapped,
            self.optimizer.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
            options=OPTIONS,
        )
        scheduler = os.path.join(checkpoint, "scheduler.pt")
        self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))


class RunFinished(Exception):
    """The checkpoint resumed from already holds every step of the run."""


class StopIfFinished(TrainerCallback):
    """Raise RunFinished where Trainer would train a step too many (seen in transformers 5.23.0)."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise RunFinished
