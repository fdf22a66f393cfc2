"""LoRA as the recipes use it: on every linear layer and every stack of experts."""

import re

import torch
from peft import LoraConfig
from trl import ModelConfig

from finetune.errors import UserError


def expert_parameters(model: torch.nn.Module) -> list[str]:
    """Names, within a layer, of the parameters that stack one weight per expert: (E, in, out).

    They are found in the model by their three dimensions, so that no table of model sizes has to be
    kept. Raises UserError if there are none: LoRA would silently train no expert.
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
    """PEFT's configuration from TRL's flags; None without --use_peft.

    Where the flags name no targets, LoRA is put on every linear layer and every stack of experts.
    """
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
