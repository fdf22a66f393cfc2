"""gpt-oss as it is trained here: made where its weights will be, experts found for LoRA."""

import re
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig

import experts
from attention import isolate_packed_sequences
from errors import UserError
from weights import Checkpoint, fill


def load_config(model_id: str, *, revision: str = "main") -> GptOssConfig:
    """Read the model's config. Raises UserError if it cannot be had or is not gpt-oss."""
    try:
        config = AutoConfig.from_pretrained(model_id, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model {model_id!r} cannot be read: give a hub name (is the hub reachable?) "
            f"or a folder with config.json; {str(error).splitlines()[0]}"
        ) from error
    if config.model_type != "gpt_oss":
        raise UserError(
            f"model {model_id!r} is {config.model_type!r}, not gpt_oss: set MODEL to "
            "openai/gpt-oss-20b, openai/gpt-oss-120b or a fine-tune of one"
        )
    return config


def load_tokenizer(model_id: str, *, revision: str = "main") -> PreTrainedTokenizerBase:
    """Read the tokenizer with its chat template. Raises UserError if it cannot be had."""
    try:
        return AutoTokenizer.from_pretrained(model_id, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if Path(model_id).is_dir() and not (Path(model_id) / "tokenizer.json").exists():
            reason = "the folder holds no tokenizer.json: copy it from the model it was made from"
        raise UserError(f"the tokenizer of {model_id!r} cannot be read; {reason}") from error


def load_model(
    weights: Checkpoint, *, attn_implementation: str, dequantize: bool = True
) -> GptOssForCausalLM:
    """gpt-oss with the weights of a checkpoint, bf16 but for experts stored in MXFP4, which stay so
    unless dequantize is set, where this process will train them.

    Under FSDP2 it stays on the meta device: weights.shard_and_fill, called when the adapter is in
    its place, has each rank read its share. Raises UserError if MXFP4 would have to be sharded.
    """
    config = load_config(weights.model_id, revision=weights.revision)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is trained and saved is not quantized
    config.use_cache = False
    config._attn_implementation = attn_implementation
    config._experts_implementation = experts.NAME
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        # Not from_config: under ZeRO-3 it would share out weights that are not there yet.
        model = GptOssForCausalLM(config).to(torch.bfloat16)
    with suppress(OSError):  # it is optional
        model.generation_config = GenerationConfig.from_pretrained(
            weights.model_id, revision=weights.revision
        )
    isolate_packed_sequences(model)

    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    offloaded = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if (sharded or offloaded) and not dequantize:
        raise UserError(
            "an MXFP4 base is not sharded, every GPU holds all of it: set ACCELERATE_CONFIG to "
            "/sft/ddp.yaml, or add --dequantize true"
        )
    if not sharded:
        device = torch.device("cpu") if offloaded else PartialState().device
        fill(model, weights, device=device, dequantize=dequantize)
    return model


def expert_parameters(model: torch.nn.Module) -> list[str]:
    """Names, below a layer, of the parameters that stack a weight per expert: (E, in, out).

    Read from the model itself, so that a new size needs no new line here. Raises UserError if none.
    """
    names = {
        re.sub(r"^.*layers\.\d+\.", "", name)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
    }
    if not names:
        raise UserError("the model holds no stacked expert weights for LoRA to adapt")
    return sorted(names)


def lora_config(model: torch.nn.Module, args: ModelConfig) -> LoraConfig | None:
    """LoRA on every linear layer and every expert unless told otherwise."""
    if not args.use_peft:
        return None
    return LoraConfig(
        task_type=args.lora_task_type,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules or "all-linear",
        target_parameters=args.lora_target_parameters or expert_parameters(model),
        modules_to_save=args.lora_modules_to_save,
        use_rslora=args.use_rslora,
    )
