"""What makes two launches the same run: a resume under anything else is refused."""

import hashlib
import importlib.metadata
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from trl import ScriptArguments

from finetune.arguments import Config
from finetune.checkpoint.manifest import read_manifest
from finetune.data.options import DataArguments
from finetune.errors import UserError
from finetune.model.loading import load_config

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
TRAINING = (
    "data_seed",
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
    "lora_r",
    "lora_alpha",
    "use_rslora",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
)
HELD_OUT = ("eval_strategy", "dataset_config", "dataset_train_split", "dataset_test_split")
EDGE_BYTES = 2**20  # of a weights file, hashed at its beginning and at its end


@dataclass(frozen=True)
class RunRecord:
    """What a run trains on what, and how: all that decides its result.

    A checkpoint's manifest holds it under "fingerprint", final/summary.json under "run". Which
    conversations were held out (HELD_OUT) is only in the latter: it does not change the weights.
    """

    model: str
    model_revision: str
    dataset: str
    seed: int
    use_peft: bool
    data: DataArguments = field(default_factory=DataArguments)
    dataset_sha256: str | None = None
    max_length: int | None = None
    global_batch_size: int | None = None
    training: dict[str, Any] = field(default_factory=dict)  # the flags in TRAINING
    lora: dict[str, Any] = field(default_factory=dict)  # the flags in LORA
    packages: dict[str, str] = field(default_factory=dict)  # versions of PACKAGES
    eval_strategy: str = "no"
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"

    def to_json(self) -> dict[str, Any]:
        """Everything, in one level."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        nested = ("training", "lora", "packages")
        flat = asdict(values.pop("data"))
        for name in nested:
            flat |= values.pop(name)
        return values | flat

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be resumed, as JSON values."""
        return {name: value for name, value in self.to_json().items() if name not in HELD_OUT}

    def script_arguments(self) -> ScriptArguments:
        """The flags that name the dataset and its parts, as data/dataset.py takes them."""
        return ScriptArguments(
            dataset_name=self.dataset,
            dataset_config=self.dataset_config,
            dataset_train_split=self.dataset_train_split,
            dataset_test_split=self.dataset_test_split,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "RunRecord":
        """What to_json or identity wrote. Raises KeyError if the model or the data is missing."""
        data = {f.name for f in fields(DataArguments)} & values.keys()
        plain = {f.name for f in fields(cls)} & values.keys()
        required = ("model", "model_revision", "dataset", "seed", "use_peft")
        return cls(
            **{name: values[name] for name in (*required, *sorted(plain - set(required)))},
            data=DataArguments(**{name: values[name] for name in data}),
            training={name: values[name] for name in TRAINING if name in values},
            lora={name: values[name] for name in LORA if name in values},
            packages={name: public(values[name]) for name in PACKAGES if name in values},
        )


def run_record(
    config: Config, dataset: Dataset, *, conversation_start_date: str, num_processes: int
) -> RunRecord:
    """The record of the run that these flags make. dataset: the tokens and labels trained on.

    How many processes share a batch is not part of it, the batch they make together is.
    """
    script, training, model = config.script, config.training, config.model
    sequences = training.per_device_train_batch_size * num_processes
    return RunRecord(
        model=config.model_id,
        model_revision=model_revision(config.model_id, revision=model.model_revision),
        dataset=config.dataset,
        seed=training.seed,
        use_peft=model.use_peft,
        data=replace(config.data, conversation_start_date=conversation_start_date),
        dataset_sha256=dataset_sha256(dataset),
        max_length=training.max_length,
        global_batch_size=sequences * training.gradient_accumulation_steps,
        training={name: plain(getattr(training, name)) for name in TRAINING},
        lora={name: plain(getattr(model, name)) for name in LORA},
        packages={name: public(importlib.metadata.version(name)) for name in PACKAGES},
        eval_strategy=plain(training.eval_strategy),
        dataset_config=script.dataset_config,
        dataset_train_split=script.dataset_train_split,
        dataset_test_split=script.dataset_test_split,
    )


def plain(value: Any) -> Any:
    """As JSON holds it."""
    return value.value if isinstance(value, Enum) else value


def public(version: str) -> str:
    """A version without its local part: 2.13.0+cpu and 2.13.0+cu130 are the same release."""
    return version.split("+")[0]


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
            for start in (0, max(0, size - EDGE_BYTES)):
                weights.seek(start)
                digest.update(weights.read(EDGE_BYTES))
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


def read_record(folder: Path) -> RunRecord:
    """Of the run that wrote a complete checkpoint."""
    return RunRecord.from_json(read_manifest(folder)["fingerprint"])


def check_same_run(checkpoint: str, saved: RunRecord, current: RunRecord) -> None:
    """Raise UserError, naming every difference, if the checkpoint is another run's."""
    before, now = saved.identity(), current.identity()
    changed = [
        f"{name} {before.get(name)} -> {now.get(name)}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise UserError(
            f"{checkpoint} is of another run ({'; '.join(changed)}): start this one under another "
            "RUN_NAME, or go on from it all the same with --ignore_fingerprint true"
        )
