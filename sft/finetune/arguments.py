"""The flags of a training run: TRL's dataclasses and ours, parsed once into a Config."""

import os
import re
import sys
from dataclasses import dataclass, field, replace
from typing import NoReturn

from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from finetune.command_line import one_line
from finetune.data.options import DataArguments, check_data_arguments
from finetune.errors import UserError
from finetune.node import num_processes
from finetune.task_file import TaskFile

# What a folder, an object of a bucket, a W&B run, a picture's title and a shell all take as it is.
# W&B's names are the shortest: 128 characters, of which tracking.py adds some.
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class RunArguments:
    """What TRL's own flags lack."""

    save_every_minutes: float = field(
        default=5.0,
        metadata={
            "help": "Minutes between checkpoints, whatever --save_steps says. A run that is killed "
            "loses at most these, plus the time that writing and uploading a checkpoint takes."
        },
    )
    ignore_fingerprint: bool = field(
        default=False,
        metadata={
            "help": "Resume although the model, the data or a hyperparameter differs from those of "
            "the run that wrote the checkpoint."
        },
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Rows of one optimizer step, on all GPUs together. Each GPU computes as many "
            "of its share at once as --per_device_train_batch_size allows, and accumulates "
            "gradients over the rest. By default it follows from --per_device_train_batch_size, "
            "--gradient_accumulation_steps and the GPUs."
        },
    )
    dequantize: bool | None = field(
        default=None,
        metadata={
            "help": "Unpack the MXFP4 experts to bf16 while loading, four times the memory. By "
            "default only where they are trained: LoRA keeps them packed."
        },
    )
    price_per_hour: float = field(
        default=0.0,
        metadata={
            "help": "Dollars an hour of all machines of this launch, from which the summary tells "
            "what the run has cost. 0: not known."
        },
    )


@dataclass(frozen=True)
class Config:
    """Every flag of a run. Nothing changes it after parse_args."""

    script: ScriptArguments
    training: SFTConfig
    model: ModelConfig
    data: DataArguments
    run: RunArguments

    @property
    def model_id(self) -> str:
        """The hub's name or the folder of the model that is trained."""
        assert self.model.model_name_or_path is not None  # parse_args has checked it
        return self.model.model_name_or_path

    @property
    def dataset(self) -> str:
        """The sources of the conversations, as data/sources.py reads them."""
        assert self.script.dataset_name is not None  # parse_args has checked it
        return self.script.dataset_name


class TrainingParser(TrlParser):
    """TRL's parser; a mistake is a UserError instead of the usage of 160 flags."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"flags: {one_line(message, list(self._option_string_actions))}")


def training_parser() -> TrainingParser:
    return TrainingParser((ScriptArguments, SFTConfig, ModelConfig, DataArguments, RunArguments))


def check_spelling(args: list[str] | None = None) -> None:
    """Raise UserError for a flag that does not exist or a value of the wrong type.

    Called before the GPUs are looked at, which SFTConfig does too while it is made.
    """
    if "--config" not in (args or sys.argv):  # a file's values count as well: parse_args reads it
        check_run_name(training_parser().parse_args(args).run_name)


def check_run_name(name: str | None) -> None:
    """Raise UserError for a name that cannot be a folder, an object and a title alike."""
    if name is not None and not RUN_NAME.fullmatch(name):
        raise UserError(
            f"RUN_NAME {name!r} cannot be used: give a name of 1 to 64 letters, digits, '.', '_' "
            "and '-' that begins with a letter or a digit"
        )


def parse_args(args: list[str] | None = None, *, num_gpus: int | None = None) -> Config:
    """Parse the flags, by default those of the command line.

    num_gpus: those that share a global batch, by default the ranks of this launch.
    Raises UserError for unknown flags, wrong values and flags that contradict each other.
    """
    try:
        config = Config(*training_parser().parse_args_and_config(args))
    except (ValueError, OSError) as error:
        raise UserError(f"flags: {error}") from error
    check_flags(config)
    check_unused_flags(config)
    check_data_arguments(config.data)
    if config.run.global_batch_size is not None:
        at_once, times = share_out(config, num_gpus=num_gpus or num_processes())
        config.training.per_device_train_batch_size = at_once
        config.training.gradient_accumulation_steps = times
    return resolved(config)


def parse_task(task: TaskFile, *changes: str) -> Config:
    """The flags of a task file, as train.py would parse them on the node.

    changes: flags that take precedence. Raises UserError as parse_args does.
    """
    # Without --use_cpu SFTConfig refuses bf16 on a machine that has no GPU.
    return parse_args([*task.flags, *changes, "--use_cpu=true"], num_gpus=task.num_gpus)


def share_out(config: Config, *, num_gpus: int) -> tuple[int, int]:
    """How each GPU computes its part of --global_batch_size rows: rows at once, and how many times.

    As many at once as --per_device_train_batch_size allows: products are then larger, and what is
    done for each batch, as unpacking or gathering weights, is done less often.
    Raises UserError if the rows cannot be shared out, or accumulation is given a second time.
    """
    training, rows = config.training, config.run.global_batch_size
    most = training.per_device_train_batch_size
    assert rows is not None
    if training.gradient_accumulation_steps != 1:
        raise UserError(
            f"--gradient_accumulation_steps {training.gradient_accumulation_steps} is worked out "
            f"from --global_batch_size {rows}: remove it, and set GLOBAL_BATCH_SIZE in the task "
            "file to the rows of a step on all GPUs together"
        )
    if rows < 1 or rows % num_gpus:
        raise UserError(
            f"a global batch of {rows} rows (GLOBAL_BATCH_SIZE) cannot be shared out among "
            f"{num_gpus} GPUs; set it to a multiple of {num_gpus}, or take fewer GPUs"
        )
    if most < 1:
        raise UserError(f"--per_device_train_batch_size {most} must be at least 1")
    share = rows // num_gpus
    at_once = max(size for size in range(1, most + 1) if share % size == 0)
    return at_once, share // at_once


def resolved(config: Config) -> Config:
    """The Config with what was left open decided. Raises UserError if that cannot be trained."""
    training, run = config.training, config.run
    dequantize = not config.model.use_peft if run.dequantize is None else run.dequantize
    if not (dequantize or config.model.use_peft):
        raise UserError(
            "--dequantize false keeps experts in MXFP4, which cannot be trained: it is for LoRA, "
            "add --use_peft true or remove it"
        )
    # Published checkpoints carry 0.9, a coefficient of pre-training, and trl takes it from the
    # config unless told: the loss would be drowned. The published router is balanced already.
    if training.router_aux_loss_coef is None:
        training.router_aux_loss_coef = 0.0
    # "all" counts padding as well, and the rate would rise with it.
    training.include_num_input_tokens_seen = "non_padding"
    # transformers replaces losses that are not finite in the log by default. Here they end the run.
    training.logging_nan_inf_filter = False
    training.report_to = ["wandb"] if os.environ.get("WANDB_API_KEY") else []
    return replace(config, run=replace(run, dequantize=dequantize))


def check_flags(config: Config) -> None:
    """Raise UserError for flags that are missing or contradict each other."""
    model = config.model
    check_run_name(config.training.run_name)
    if not model.model_name_or_path:
        raise UserError("no model: set --model_name_or_path (MODEL in the task file)")
    if not config.script.dataset_name:
        raise UserError("no dataset: set --dataset_name (DATASET in the task file)")
    defaults = ModelConfig()
    changed = [
        name
        for name in vars(defaults)
        if name.startswith("lora_") and getattr(model, name) != getattr(defaults, name)
    ]
    if changed and not model.use_peft:
        raise UserError(
            f"--{changed[0]} is for LoRA, but this run trains all weights: "
            "add --use_peft true or remove it"
        )
    if model.use_peft and model.lora_dropout:
        raise UserError("--lora_dropout must be 0: PEFT adapts expert weights without dropout only")
    if model.load_in_4bit or model.load_in_8bit:
        raise UserError(
            "--load_in_4bit/8bit: bitsandbytes does not know gpt-oss's experts; remove it"
        )


def check_unused_flags(config: Config) -> None:
    """Raise UserError for flags of TRL that would be ignored here, or would fail on every rank."""
    script, training, model = config.script, config.training, config.model
    asked = training.report_to or []
    # `--report_to all` arrives here as this list of everything that is installed.
    reports = [] if asked == get_available_reporting_integrations() else asked
    refusals = {
        "--use_dora: DoRA does not know expert weights; remove it": model.use_dora,
        "--dataset_streaming: datasets are tokenised once and memory-mapped; remove it": (
            script.dataset_streaming
        ),
        "--completion_only_loss: what is in the loss is set by --train_on; remove it": (
            training.completion_only_loss is not None
        ),
        "--assistant_only_loss: --train_on assistant is that, and the default; remove it": (
            training.assistant_only_loss
        ),
        "--use_liger_kernel: liger-kernel is not installed, nor knows these experts; remove it": (
            training.use_liger_kernel
        ),
        "--dtype: weights are trained in bfloat16; remove it": (
            model.dtype not in ("auto", "bfloat16", ModelConfig().dtype)
        ),
        "--report_to: only W&B is reported to, where WANDB_API_KEY is set; remove it": bool(
            set(reports) - {"wandb", "kubeflow"}
        ),
    }
    for message, is_refused in refusals.items():
        if is_refused:
            raise UserError(message)
