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
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainerCallback, TrainerState
from trl import SFTTrainer

from finetune.checkpoint.saver import Saver
from finetune.model.weights import BaseWeights, shard_and_fill

# A LoRA checkpoint holds the adapter, not the frozen base.
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


class ResumableSFTTrainer(SFTTrainer):
    """Weights and optimizer go through torch DCP; what is small, Trainer's own way.

    DeepSpeed keeps its own format, saved while training waits.
    """

    def __init__(
        self, *args: Any, saver: Saver, weights: BaseWeights | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.saver = saver
        self.weights = weights
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


def configure_gradients(trainer: SFTTrainer) -> None:
    """Under FSDP2, add gradients up over the ranks in fp32, batch by batch; leave the loss alone.

    accelerate 1.15.0 sets all three dtypes of the policy to bf16, so that even the logged loss is
    rounded to three digits; torchtitan's defaults are these. And while it accumulates batches it
    keeps the gradient of the whole model on every GPU: 84 GB for 20b.

    In data parallel, gradients lie in the buckets they are exchanged in: no second copy of them.
    """
    accelerator = trainer.accelerator
    if trainer.is_fsdp_enabled:
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    elif accelerator.ddp_handler is not None:
        accelerator.ddp_handler.gradient_as_bucket_view = True
