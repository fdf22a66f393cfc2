"""gpt-oss as it is trained here: MXFP4 unpacked to bf16, experts found for LoRA."""

import re
from typing import Any

import torch
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GptOssConfig,
    GptOssForCausalLM,
    Mxfp4Config,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig

import experts
from attention import isolate_packed_sequences
from errors import UserError


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
        raise UserError(
            f"the tokenizer of {model_id!r} cannot be read; {str(error).splitlines()[0]}"
        ) from error


def load_model(
    model_id: str, *, revision: str = "main", attn_implementation: str
) -> GptOssForCausalLM:
    """Load a gpt-oss checkpoint, MXFP4 or float, as bf16 weights that can be trained."""
    config = load_config(model_id, revision=revision)
    quantization = getattr(config, "quantization_config", None)
    kwargs: dict[str, Any] = {}
    if quantization is not None:
        kwargs["quantization_config"] = Mxfp4Config(dequantize=True)
    try:
        model = GptOssForCausalLM.from_pretrained(
            model_id,
            revision=revision,
            dtype=torch.bfloat16,
            attn_implementation=attn_implementation,
            experts_implementation=experts.NAME,
            use_cache=False,
            **kwargs,
        )
    except OSError as error:
        raise UserError(
            f"the weights of {model_id!r} cannot be read; {str(error).splitlines()[0]}"
        ) from error
    isolate_packed_sequences(model)
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
