"""The command line: TRL's dataclasses, and which of their flags contradict each other."""

from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from transformers.integrations import get_available_reporting_integrations
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from errors import UserError
from harmony import TrainOn


@dataclass
class RunArguments:
    """What TRL's own flags lack."""

    save_every_minutes: float = field(
        default=5.0,
        metadata={"help": "Save whenever this long has passed; a save must reach the bucket too."},
    )
    ignore_fingerprint: bool = field(
        default=False, metadata={"help": "Resume even a checkpoint of a run defined otherwise."}
    )
    dequantize: bool | None = field(
        default=None,
        metadata={"help": "Unpack MXFP4 experts to bf16 once. Unset: only where they are trained."},
    )


@dataclass
class DataArguments:
    """How conversations are rendered, and what of them is learnt."""

    train_on: TrainOn = field(
        default="assistant",
        metadata={"help": "What is in the loss: the assistant's turns, its last one, everything."},
    )
    learn_no_thinking: bool = field(
        default=False,
        metadata={"help": "Learn to answer without thinking where the data has no thinking."},
    )
    reasoning_effort: Literal["low", "medium", "high"] = field(
        default="medium",
        metadata={"help": "Of conversations without a `reasoning_effort` of their own."},
    )
    conversation_start_date: str = field(
        default="",
        metadata={"help": "The date the model is told; by default that of the first launch."},
    )
    truncate: bool = field(
        default=False,
        metadata={"help": "Cut conversations at --max_length instead of leaving them out."},
    )
    test_split_size: float = field(
        default=0.0,
        metadata={"help": "The share to hold out for evaluation (with --eval_strategy)."},
    )


Arguments = tuple[ScriptArguments, SFTConfig, ModelConfig, DataArguments, RunArguments]


def parse_args(args: list[str] | None = None) -> Arguments:
    """Parse the flags. Raises UserError for unknown and for contradicting ones."""
    try:
        parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DataArguments, RunArguments))
        arguments = parser.parse_args_and_config(args)
    except ValueError as error:
        raise UserError(f"flags: {error}") from error
    script_args, training_args, model_args, data_args, run_args = arguments
    check_flags(script_args, training_args, model_args)
    check_unused_flags(script_args, training_args, model_args)
    check_data_flags(data_args)
    if run_args.dequantize is None:
        run_args.dequantize = not model_args.use_peft
    if not (run_args.dequantize or model_args.use_peft):
        raise UserError(
            "--dequantize false keeps experts in MXFP4, which cannot be trained: it is for LoRA, "
            "add --use_peft true or remove it"
        )
    # Published checkpoints carry 0.9, a coefficient of pre-training, and trl takes it from the
    # config unless told: the loss would be drowned. The published router is balanced already.
    if training_args.router_aux_loss_coef is None:
        training_args.router_aux_loss_coef = 0.0
    return script_args, training_args, model_args, data_args, run_args


def check_flags(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig
) -> None:
    """Raise UserError for flags that are missing or contradict each other."""
    if not model_args.model_name_or_path:
        raise UserError("no model: set --model_name_or_path (MODEL in the task file)")
    if not script_args.dataset_name:
        raise UserError("no dataset: set --dataset_name (DATASET in the task file)")
    defaults = ModelConfig()
    changed = [
        name
        for name in vars(defaults)
        if name.startswith("lora_") and getattr(model_args, name) != getattr(defaults, name)
    ]
    if changed and not model_args.use_peft:
        raise UserError(
            f"--{changed[0]} is for LoRA, but this run trains all weights: "
            "add --use_peft true or remove it"
        )
    if model_args.use_peft and model_args.lora_dropout:
        raise UserError("--lora_dropout must be 0: PEFT adapts expert weights without dropout only")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise UserError(
            "--load_in_4bit/8bit: bitsandbytes does not know gpt-oss's experts; remove it"
        )


def check_unused_flags(
    script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig
) -> None:
    """Raise UserError for flags of TRL's that would be ignored here, or fail on every rank."""
    asked = training_args.report_to or []
    # What `all` stands for; trl's default is nothing.
    reports = [] if asked == get_available_reporting_integrations() else asked
    refusals = {
        "--use_dora: DoRA does not know expert weights; remove it": model_args.use_dora,
        "--dataset_streaming: datasets are tokenised once and memory-mapped; remove it": (
            script_args.dataset_streaming
        ),
        "--completion_only_loss: what is in the loss is set by --train_on; remove it": (
            training_args.completion_only_loss is not None
        ),
        "--assistant_only_loss: --train_on assistant is that, and the default; remove it": (
            training_args.assistant_only_loss
        ),
        "--use_liger_kernel: liger-kernel is not installed, nor knows these experts; remove it": (
            training_args.use_liger_kernel
        ),
        "--dtype: weights are trained in bfloat16; remove it": (
            model_args.dtype not in ("auto", "bfloat16", ModelConfig().dtype)
        ),
        "--report_to: only W&B is reported to, where WANDB_API_KEY is set; remove it": bool(
            set(reports) - {"wandb", "kubeflow"}
        ),
    }
    for message, is_refused in refusals.items():
        if is_refused:
            raise UserError(message)


def check_data_flags(data_args: DataArguments) -> None:
    """Raise UserError for values out of range."""
    if not 0 <= data_args.test_split_size < 1:
        raise UserError("--test_split_size is a share: at least 0, less than 1")
    try:
        date.fromisoformat(data_args.conversation_start_date or "2026-01-02")
    except ValueError:
        raise UserError("--conversation_start_date is a date like 2026-01-02") from None
