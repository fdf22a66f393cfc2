"""What makes two launches the same run; a checkpoint of another run is not resumed.

In a checkpoint's manifest.json the record is called "fingerprint", in final/summary.json "run".
"""

import hashlib
import importlib.metadata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers.utils import cached_file, extract_commit_hash
from trl import ScriptArguments

from finetune.arguments import Config
from finetune.checkpoint.manifest import (
    MANIFEST,
    check_complete,
    newest_checkpoint,
    read_manifest,
)
from finetune.credentials import without_secrets
from finetune.data.dataset import load_splits
from finetune.data.options import DataArguments, EarlierDataArguments
from finetune.errors import UserError
from finetune.model.loading import load_config

# Packages whose version can change the numbers of a run.
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
# Flags of SFTConfig that decide a run's result. Those that only decide its speed, when it saves or
# what it logs are not among them. seed and max_length are fields of RunRecord.
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
# Flags of ModelConfig that decide which adapter is trained. use_peft is a field of RunRecord.
LORA = (
    "lora_r",
    "lora_alpha",
    "use_rslora",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
)
# How a run trains beyond its flags. Runs that began under older rules go on by theirs.
# 1: the learning rate of the first warm-up step is 0; weight decay as transformers has it.
# 2: warm-up starts at its first increment; sinks, router and embeddings are not decayed.
#    Each row counts once an epoch; before, some were trained twice to fill the last batches.
# 3: conversations are rendered as DataArguments says; before, as EarlierDataArguments says.
TRAINING_RULES = 3
# Fields that decide only what is evaluated, not what is trained.
HELD_OUT = ("eval_strategy", "dataset_config", "dataset_train_split", "dataset_test_split")
# A local model's weights are not hashed in full, which would take minutes for 120b: only this much
# at the beginning of each file (its header and first tensors) and at its end.
EDGE_BYTES = 2**20


@dataclass(frozen=True)
class RunRecord:
    """All that decides the result of a run: the model, the data, the flags, the packages.

    How many processes share a global batch is not part of it: a run may be resumed on another
    number of GPUs. The JSON form is flat, with the keys of `data`, `training`, `lora` and
    `packages` beside the other fields'. Runs in users' buckets hold it, so its keys must stay.
    """

    model: str
    model_revision: str
    dataset: str
    seed: int
    use_peft: bool
    data: DataArguments = field(default_factory=DataArguments)
    dataset_sha256: str | None = None  # of the tokens and labels that are trained on
    max_length: int | None = None  # tokens
    global_batch_size: int | None = None  # sequences per optimizer step, on all GPUs together
    training: dict[str, Any] = field(default_factory=dict)  # the flags in TRAINING
    lora: dict[str, Any] = field(default_factory=dict)  # the flags in LORA
    packages: dict[str, str] = field(default_factory=dict)  # public versions of PACKAGES
    # What another version of this code recorded beyond these; it must be equal too.
    other: dict[str, Any] = field(default_factory=dict)
    eval_strategy: str = "no"
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    training_rules: int = 1  # see TRAINING_RULES; records of rules 1 do not hold it

    def to_json(self) -> dict[str, Any]:
        """The record as one flat object."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= asdict(values.pop("data"))
        for name in ("training", "lora", "packages", "other"):
            values |= values.pop(name)
        if self.training_rules == 1:
            del values["training_rules"]
        if self.training_rules < 3:
            del values["learn_past_thinking"]
        if not self.data.skip_bad_rows:  # as in the records of runs that could not skip any
            del values["skip_bad_rows"]
        return values

    def identity(self) -> dict[str, Any]:
        """The part of to_json() that must be equal for a checkpoint to be resumed.

        What is held out is missing from it if only the evaluation depends on it. (The size of a
        share that is held out is in it, since the rest is what is trained on.)
        """
        return {name: value for name, value in self.to_json().items() if name not in HELD_OUT}

    def load_splits(self) -> tuple[Dataset, Dataset | None]:
        """The conversations that the run trains on, and those that it holds out, if any.

        Raises UserError if the dataset cannot be read on this machine.
        """
        script_args = ScriptArguments(
            dataset_name=self.dataset,
            dataset_config=self.dataset_config,
            dataset_train_split=self.dataset_train_split,
            dataset_test_split=self.dataset_test_split,
        )
        return load_splits(
            script_args,
            eval_strategy=self.eval_strategy,
            test_split_size=self.data.test_split_size,
            skip_bad_rows=self.data.skip_bad_rows,
            seed=self.seed,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any], *, file: Path) -> "RunRecord":
        """What to_json() or identity() wrote to `file`. Raises UserError, naming the file, if it
        does not say which model was trained on what.

        A key that an older version did not write yet has its default here, and so must mean what
        that version did; the flags in TRAINING and LORA have none and differ from any value.
        """
        required = ("model", "model_revision", "dataset", "seed", "use_peft")
        missing = [name for name in required if name not in values]
        if missing:
            raise UserError(
                f"{file} does not hold the run's {', '.join(missing)}: it was not written by "
                "train.py, or by a version too old to be read"
            )
        problem = type_problem(values)
        if problem is not None:
            raise UserError(f"{file} says of its run that {problem}: it is not what was written")
        nested = ("data", "training", "lora", "packages", "other")
        own = [f.name for f in fields(cls) if f.name not in nested]
        data = [f.name for f in fields(DataArguments)]
        known = {*own, *data, *TRAINING, *LORA, *PACKAGES}

        def pick(names: Iterable[str]) -> dict[str, Any]:
            return {name: values[name] for name in names if name in values}

        # Versions before this one recorded credentials too.
        values = values | {"dataset": without_secrets(values["dataset"])}
        return cls(
            **pick(own),
            data=data_by_rules(DataArguments(**pick(data)), values.get("training_rules", 1)),
            training=pick(TRAINING),
            lora=pick(LORA),
            packages={name: public(version) for name, version in pick(PACKAGES).items()},
            other={name: value for name, value in values.items() if name not in known},
        )


def type_problem(values: dict[str, Any]) -> str | None:
    """A value of a type that no version has written and that could not be used, or None."""
    texts = ("model", "model_revision", "dataset", *(name for name in PACKAGES if name in values))
    kinds = {**dict.fromkeys(texts, str), "seed": int, "use_peft": bool}
    if "training_rules" in values:
        kinds["training_rules"] = int
    for name, kind in kinds.items():
        if not isinstance(values[name], kind):
            return f"{name} is {values[name]!r}"
    date = values.get("conversation_start_date")
    return None if date is None or isinstance(date, str) else f"its date is {date!r}"


def data_by_rules(data: DataArguments, training_rules: int) -> DataArguments:
    """The flags of the data as a run under these rules takes them."""
    if training_rules >= 3:
        return data
    return EarlierDataArguments(**asdict(data) | {"learn_past_thinking": False})


def run_record(
    config: Config,
    dataset: Dataset,
    *,
    conversation_start_date: str,
    num_processes: int,
    training_rules: int = TRAINING_RULES,
) -> RunRecord:
    """The record of the run that these flags describe.

    dataset: the tokens and labels that are trained on, before packing. conversation_start_date and
    training_rules: those in use, which may come from an earlier launch.
    """
    script, training, model = config.script, config.training, config.model
    sequences = training.per_device_train_batch_size * num_processes
    return RunRecord(
        model=config.model_id,
        model_revision=model_revision(config.model_id, revision=model.model_revision),
        # A URL that is signed anew is the same data; and its signature is nobody else's business.
        dataset=without_secrets(config.dataset),
        seed=training.seed,
        use_peft=model.use_peft,
        data=replace(
            data_by_rules(config.data, training_rules),
            conversation_start_date=conversation_start_date,
        ),
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
        training_rules=training_rules,
    )


def plain(value: Any) -> Any:
    """An enum's value; anything else as it is. JSON holds it so."""
    return value.value if isinstance(value, Enum) else value


def public(version: str) -> str:
    """A version without its local suffix: 2.13.0+cpu and 2.13.0+cu130 are the same release."""
    return version.split("+")[0]


def model_revision(model_id: str, *, revision: str) -> str:
    """The hub's commit, also of a folder in the hub's cache; the hash of any other folder."""
    load_config(model_id, revision=revision)  # refuses what is not there, or is not gpt-oss
    # transformers 5.23.0 leaves the commit out of its configs; the path of a cached file holds it.
    commit = extract_commit_hash(cached_file(model_id, "config.json", revision=revision), None)
    return folder_hash(Path(model_id)) if commit is None else commit


def folder_hash(folder: Path) -> str:
    """A hash of a model's config.json and of the size, beginning and end of each of its weights
    files.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as weights:
            size = weights.seek(0, 2)
            digest.update(f"{file.name} {size}".encode())
            for start in (0, max(0, size - EDGE_BYTES)):
                weights.seek(start)
                digest.update(weights.read(EDGE_BYTES))
    return digest.hexdigest()[:16]


def dataset_sha256(dataset: Dataset) -> str:
    """A hash of every row's tokens and labels, in order.

    Chunks and files of the dataset do not matter: only where one row ends and the next begins.
    """
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        for name in ("input_ids", "labels"):
            column = batch[name].combine_chunks()
            digest.update(np.diff(column.offsets.to_numpy()).astype(np.int64).tobytes())
            digest.update(column.flatten().to_numpy().astype(np.int64).tobytes())
    return digest.hexdigest()[:16]


def read_record(folder: Path) -> RunRecord:
    """The record in a complete checkpoint's manifest. Raises UserError if it holds none."""
    try:
        fingerprint = read_manifest(folder).get("fingerprint", {})
    except (OSError, ValueError) as error:  # it has been deleted or replaced since it was checked
        raise UserError(f"{folder}: its {MANIFEST} cannot be read: {error}") from error
    return RunRecord.from_json(fingerprint, file=folder / MANIFEST)


def launch_rules(resume_flag: str | None, run_dir: str) -> int:
    """The rules of a launch: those under which the run that it resumes began. See TRAINING_RULES.

    resume_flag: --resume_from_checkpoint. A new run, and one of rules unknown here, has ours.
    """
    if resume_flag is None or resume_flag.lower() == "false":
        return TRAINING_RULES
    if resume_flag.lower() == "true":
        checkpoint = newest_checkpoint(run_dir)
    else:  # resume_from refuses a path of which there is no complete checkpoint
        checkpoint = Path(resume_flag) if check_complete(Path(resume_flag)) is None else None
    if checkpoint is None:
        return TRAINING_RULES
    return min(read_record(checkpoint).training_rules, TRAINING_RULES)


def is_same_fingerprint(saved: dict[str, Any], current: dict[str, Any], *, file: Path) -> bool:
    """Whether two manifests' fingerprints are of one run. file: that of `saved`."""
    if saved == current:
        return True
    try:
        records = [RunRecord.from_json(values, file=file) for values in (saved, current)]
    except UserError:
        return False
    return records[0].identity() == records[1].identity()


def changed_fields(saved: RunRecord, current: RunRecord) -> list[str]:
    """What makes these two different runs, one text for each difference."""
    before, now = saved.identity(), current.identity()
    return [
        f"{name} {before.get(name)} -> {now.get(name)}"
        for name in sorted(before | now)
        if before.get(name) != now.get(name)
    ]


def check_same_run(checkpoint: str | Path, saved: RunRecord, current: RunRecord) -> None:
    """Raise UserError, naming every difference, if the checkpoint belongs to another run."""
    changed = changed_fields(saved, current)
    if changed:
        raise UserError(
            f"{checkpoint} is of another run ({'; '.join(changed)}): start this one under another "
            "RUN_NAME, or go on from it all the same with --ignore_fingerprint true"
        )
