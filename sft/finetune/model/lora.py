"""LoRA as the recipes use it: on every linear layer and every stack of experts."""

import re

import torch
from peft import LoraConfig
from trl import ModelConfig

from finetune.errors import UserError


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
