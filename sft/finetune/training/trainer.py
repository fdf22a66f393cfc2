"""SFTTrainer whose checkpoints are saved in the background and resumed on any number of ranks."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainerState
from trl import SFTTrainer

from finetune.checkpoint.contents import (
    SCHEDULER,
    TRAINER_STATE,
    CheckpointReader,
    load_dict,
    load_tensors,
    naming,
)
from finetune.checkpoint.fingerprint import TRAINING_RULES
from finetune.checkpoint.manifest import newest_checkpoint
from finetune.checkpoint.saver import EvaluationAbandoned, Saver
from finetune.errors import UserError
from finetune.model.lora import upcast_trained_copies
from finetune.model.weights import BaseWeights, shard_and_fill
from finetune.preemption import EXIT_STATUS, OutliveNotice
from finetune.training.divergence import Diverged, LossWatch, check_step, check_tensors
from finetune.training.filler import (
    FilledDataset,
    fill_batches,
    num_real_tokens,
    uneven_rows,
)
from finetune.training.schedule import warm_up_from_first_increment
from finetune.training.weight_decay import decayed

# A LoRA checkpoint holds the adapter and not the frozen base, which can be downloaded again.
# strict=False, since on loading the frozen parameters are then missing from it.
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


class ResumableSFTTrainer(SFTTrainer):
    """Saves weights and optimizer by torch DCP through a Saver, and small files as Trainer does.

    DCP stores shards with their place in the whole tensor: a checkpoint of eight ranks can be
    resumed on two. Under DeepSpeed a checkpoint has DeepSpeed's own format, which ties it to the
    number of ranks, and training waits while it is written.

    weights: where the values come from if the model is on the meta device. training_rules: as in
    RunRecord; a run goes on by the rules that it began with.
    """

    def __init__(
        self,
        *args: Any,
        saver: Saver,
        weights: BaseWeights | None = None,
        training_rules: int = TRAINING_RULES,
        **kwargs: Any,
    ) -> None:
        self.training_rules = training_rules
        super().__init__(*args, **kwargs)
        self.saver = saver
        self.weights = weights
        self.loss_watch = LossWatch()
        self.eval_batches: list[torch.Tensor] = []  # of an evaluation: loss and tokens, (2,) each
        self.add_callback(saver)
        if training_rules >= 2:
            upcast_trained_copies(self.model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's. When the numbers are no longer finite, the save under way, which is of a step
        before that, is still brought to its end. Raises UserError.
        """
        try:
            return super().train(*args, **kwargs)
        except Diverged as error:
            with suppress(UserError):  # one that fails takes nothing from the checkpoints before
                self.saver.finish()
            kept = newest_checkpoint(self.saver.run_dir)
            last = (
                f"the last complete checkpoint is {kept.name}"
                if kept
                else "no checkpoint is complete"
            )
            raise UserError(f"{error}; {last}") from error
        except BaseException:
            self.saver.is_abandoned = True
            raise

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer; before that, shard a model on the meta device and fill it.

        An optimizer keeps references to the parameters it is given, and sharding replaces them.
        """
        if self.weights is not None and next(self.model.parameters()).is_meta:
            shard_and_fill(self.accelerator, self.model, self.weights)
        return super().create_optimizer(*args, **kwargs)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        if self.training_rules < 2:
            return super().get_decay_parameter_names(model)
        return decayed(name for name, _ in model.named_parameters())

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LRScheduler:
        is_new = getattr(self, "lr_scheduler", None) is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new and self.training_rules >= 2:
            scheduler = warm_up_from_first_increment(
                scheduler, num_warmup_steps=self.args.get_warmup_steps(num_training_steps)
            )
        self.lr_scheduler: LRScheduler = scheduler
        return scheduler

    def _get_dataloader(self, dataset: Dataset, description: str, *args: Any, **kwargs: Any) -> Any:
        if self.training_rules < 2:
            loader = super()._get_dataloader(dataset, description, *args, **kwargs)
        else:
            rows = self._remove_unused_columns(dataset, description=description)
            loader = super()._get_dataloader(FilledDataset(rows), description, *args, **kwargs)
            fill_batches(loader)
        base = getattr(loader, "base_dataloader", loader)  # accelerate wraps what iterates
        base.worker_init_fn = OutliveNotice(base.worker_init_fn)
        return loader

    def uneven_rows(self) -> str | None:
        """For the summary: how the rows of an epoch count that do not divide by the ranks."""
        return uneven_rows(
            len(self.train_dataset),
            batch_size=self.args.per_device_train_batch_size,
            num_processes=self.args.world_size,
            drop_last=self.args.dataloader_drop_last,
            is_filled=self.training_rules >= 2,
        )

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss; under DeepSpeed checked at once, since its backward pass ends in its step."""
        loss = super().compute_loss(*args, **kwargs)
        if self.is_deepspeed_enabled and self.model.training:
            self.loss_watch.add(loss[0] if isinstance(loss, tuple) else loss)
            self.check_finite(None)
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Trainer's, with the loss put aside for the check before the optimizer's step."""
        loss = super().training_step(*args, **kwargs)
        self.loss_watch.add(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called by Trainer on all ranks directly before the optimizer's step."""
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.check_finite(grad_norm)
        return grad_norm

    def check_finite(self, grad_norm: torch.Tensor | float | None) -> None:
        """Raise UserError on all ranks if a loss or the gradient norm is not finite on one."""
        problem = self.loss_watch.problem(grad_norm)
        check_step(self.state.global_step + 1, problem, self.model, gather=self.saver.gather)

    def _track_num_input_tokens(self, inputs: dict[str, torch.Tensor]) -> None:
        """Trainer's count of tokens for the rates, without padding and without fillers."""
        num_tokens = num_real_tokens(inputs).to(self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(num_tokens).sum())

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the sum of the losses and the count of the tokens they are of."""
        result = super().prediction_step(model, inputs, *args, **kwargs)
        num_tokens = (inputs["labels"][:, 1:] != -100).sum().double().cpu()
        loss = result[0].detach().double().cpu()
        self.eval_batches.append(torch.stack([loss * num_tokens, num_tokens]))
        return result

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Trainer's, with loss, token accuracy and entropy per token. Its own and TRL's are means
        over batches, which change with the batch size and with packing. Raises UserError on all
        ranks if the loss is not finite.
        """
        self.eval_batches = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # (ranks, batches, 2) to (batches, 2): each rank has equally many batches.
        batches = torch.stack(self.saver.gather(torch.stack(self.eval_batches))).sum(dim=0)
        losses, num_tokens = batches.unbind(dim=1)
        total = num_tokens.sum().clamp(min=1)
        loss = float(losses.sum() / total)
        what = f"the losses of the evaluation after step {self.state.global_step}"
        check_tensors({"eval_loss": torch.tensor(loss)}, what, gather=self.saver.gather)
        output.metrics[f"{metric_key_prefix}_loss"] = loss
        # TRL has one number for each batch of all ranks, and logs their mean after this.
        for name in ("mean_token_accuracy", "entropy"):
            means = torch.tensor(self._metrics["eval"][name], dtype=torch.float64)
            self._metrics["eval"][name] = [float((means * num_tokens).sum() / total)]
        return output

    def state_to_save(self) -> dict[str, Any]:
        """The state dict of a checkpoint: this rank's shards of weights and optimizer states, by
        the names of the parameters.
        """
        weights, optimizer = get_state_dict(
            self.model_wrapped, self.optimizer.optimizer, options=OPTIONS
        )
        return {"model": weights, "optimizer": optimizer}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Called by Trainer on all ranks whenever control.should_save is set."""
        step = self.state.global_step
        required = self.saver.preempted or step >= self.state.max_steps
        if self.is_deepspeed_enabled:
            weights = dict(self.model.named_parameters())
            check_tensors(weights, f"weights after step {step}", gather=self.saver.gather)
            self.saver.save(step, None, self.write_with_deepspeed, required=required)
            return
        self.store_flos()  # Trainer does so first as well: it puts total_flos into the state
        state_dict = self.state_to_save()
        what = f"weights or optimizer states after step {step}"
        check_tensors(state_dict, what, gather=self.saver.gather)
        self.saver.save(step, state_dict, self.write_small_files, required=required)

    def write_with_deepspeed(self, folder: Path) -> None:
        """Weights, optimizer and small files in DeepSpeed's format: what Trainer's _save_checkpoint
        does (transformers 5.23.0), which would choose the folder's name itself.
        """
        self.store_flos()
        self.save_model(str(folder), _internal_call=True)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / TRAINER_STATE))

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Called by Trainer on all ranks. After a notice: give the evaluation up, save the step and
        stop; before the first step, where there is nothing to save, exit with status 143.

        The evaluation is not run again after the resume. The random states that are saved are those
        that a whole evaluation would have left, and so later steps are those of an undisturbed run.
        """
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationAbandoned:
            step = self.state.global_step
            if step == 0:
                self.accelerator.print("preempted before the first step: there is nothing to save")
                sys.exit(EXIT_STATUS)
            self.accelerator.print(
                f"preempted: the evaluation at step {step} is given up, and not run again"
            )
            self.control.should_save = self.control.should_training_stop = True
            self.control.should_evaluate = False  # Trainer would ask again at the epoch's end
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this is the best checkpoint; an evaluation that was given up cannot say."""
        return bool(metrics) and super()._determine_best_metric(metrics, trial)

    def write_small_files(self, folder: Path) -> None:
        """What a resume needs beside weights and optimizer."""
        self._save_rng_state(str(folder))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)
            self.state.save_to_json(str(folder / TRAINER_STATE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """No-op: weights are loaded together with the optimizer's states, in
        _load_optimizer_and_scheduler. Trainer calls this earlier, in data parallel before the
        optimizer exists.
        """

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load weights, optimizer and scheduler, however many ranks wrote the checkpoint."""
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        # The tensors of the state dict that is given are read into: the current one tells which
        # shards this rank needs.
        state_dict = self.state_to_save()
        load_tensors(state_dict, CheckpointReader(Path(checkpoint)))
        check_tensors(state_dict, f"tensors of {checkpoint}", gather=self.saver.gather)
        set_state_dict(
            self.model_wrapped,
            self.optimizer.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
            options=OPTIONS,
        )
        scheduler = Path(checkpoint) / SCHEDULER
        with naming(scheduler):
            self.lr_scheduler.load_state_dict(load_dict(scheduler))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with naming(Path(checkpoint) / "rng_state*.pth"):
                super()._load_rng_state(checkpoint)


class RunFinished(Exception):
    """The checkpoint that training resumed from is that of the run's last step."""


class Beginning(TrainerCallback):
    """Before the first step: has notices answered by a save from now on, and raises RunFinished
    when all steps are done already. First of our callbacks: others record that training has begun.

    Trainer (transformers 5.23.0) looks at max_steps only after a step, and would train one more.
    """

    def __init__(self, saver: Saver) -> None:
        self.saver = saver

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise RunFinished
        self.saver.promise_to_save()


def configure_gradients(trainer: SFTTrainer) -> None:
    """Set how gradients are summed over the ranks. Called before trainer.train(), which wraps the
    model.

    FSDP2: in fp32, and after every batch. DDP: in place.
    """
    accelerator = trainer.accelerator
    if trainer.is_fsdp_enabled:
        # accelerate 1.15.0 sets all three dtypes of the policy to bf16. Sums of gradients lose
        # precision in bf16, and with output_dtype the logged loss would be rounded to three digits.
        # torchtitan's defaults are these two.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
        # By default accelerate reduces gradients only after the last batch of a step. Until then
        # every GPU would hold the unsharded gradient of the whole model: 84 GB for 20b.
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    elif accelerator.ddp_handler is not None:
        # Gradients then live in the buckets that DDP exchanges, without a second copy.
        accelerator.ddp_handler.gradient_as_bucket_view = True
