"""What makes two launches the same run: a resume under anything else is refused."""

import hashlib
import importlib.metadata
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from trl import ModelConfig, ScriptArguments, SFTConfig

from errors import UserError
from flags import DataArguments
from model import load_config

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
TRAINING = (
    "seed",
    "data_seed",
    "max_length",
    "packing",
    "packing_strategy",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "loss_type",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "router_aux_loss_coef",
    "shuffle_dataset",
)
LORA = (
    "use_peft",
    "lora_r",
    "lora_alpha",
    "use_rslora",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
)
EDGE = 2**20


def fingerprint(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    dataset: Dataset,
    num_processes: int,
) -> dict[str, Any]:
    """What decides a run's result, as JSON values. dataset: the tokens and labels trained on.

    How many processes share a batch is not part of it, the batch they make together is.
    """
    model_id, revision = model_args.model_name_or_path, model_args.model_revision
    sequences = training_args.per_device_train_batch_size * num_processes
    return {
        "model": model_id,
        "model_revision": model_revision(model_id, revision=revision),
        "dataset": script_args.dataset_name,
        "dataset_sha256": dataset_sha256(dataset),
        **vars(data_args),
        "global_batch_size": sequences * training_args.gradient_accumulation_steps,
        **{name: plain(getattr(training_args, name)) for name in TRAINING},
        **{name: plain(getattr(model_args, name)) for name in LORA},
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def held_out(script_args: ScriptArguments, training_args: SFTConfig) -> dict[str, Any]:
    """What, beside the fingerprint, says which conversations were held out."""
    names = ("dataset_config", "dataset_train_split", "dataset_test_split")
    strategy = plain(training_args.eval_strategy)
    return {"eval_strategy": strategy, **{name: getattr(script_args, name) for name in names}}


def plain(value: Any) -> Any:
    """As JSON holds it."""
    return value.value if isinstance(value, Enum) else value


def model_revision(model_id: str, *, revision: str) -> str:
    """The hub's commit or, for a folder, a hash of its config and of the edges of its weights."""
    commit = getattr(load_config(model_id, revision=revision), "_commit_hash", None)
    if commit is not None:
        return commit
    digest = hashlib.sha256((Path(model_id) / "config.json").read_bytes())
    for file in sorted(Path(model_id).glob("*.safetensors")):
        with file.open("rb") as weights:
            size = weights.seek(0, 2)
            digest.update(f"{file.name} {size}".encode())
            for start in (0, max(0, size - EDGE)):
                weights.seek(start)
                digest.update(weights.read(EDGE))
    return digest.hexdigest()[:16]


def dataset_sha256(dataset: Dataset) -> str:
    """Of every token and label in their order, however they are cut into files and chunks."""
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        for name in ("input_ids", "labels"):
            column = batch[name].combine_chunks()
            digest.update(np.diff(column.offsets.to_numpy()).astype(np.int64).tobytes())
            digest.update(column.flatten().to_numpy().astype(np.int64).tobytes())
    return digest.hexdigest()[:16]


def check_same_run(checkpoint: str, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise UserError, naming every difference, if the checkpoint is another run's."""
    changed = [
        f"{name} {saved.get(name)} -> {current.get(name)}"
        for name in sorted(saved | current)
        if saved.get(name) != current.get(name)
    ]
    if changed:
        raise UserError(
            f"{checkpoint} is of another run ({'; '.join(changed)}): start this one under another "
            "RUN_NAME, or go on from it all the same with --ignore_fingerprint true"
        )
