"""The command line: TRL's dataclasses, and which of their flags contradict each other."""

from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from errors import UserError


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


Arguments = tuple[ScriptArguments, SFTConfig, ModelConfig, RunArguments]


def parse_args(args: list[str] | None = None) -> Arguments:
    """Parse the flags. Raises UserError for unknown and for contradicting ones."""
    try:
        parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, RunArguments))
        script_args, training_args, model_args, run_args = parser.parse_args_and_config(args)
    except ValueError as error:
        raise UserError(f"flags: {error}") from error
    check_flags(script_args, training_args, model_args)
    # Published checkpoints carry 0.9, a coefficient of pre-training, and trl takes it from the
    # config unless told: the loss would be drowned. The published router is balanced already.
    if training_args.router_aux_loss_coef is None:
        training_args.router_aux_loss_coef = 0.0
    return script_args, training_args, model_args, run_args


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
