"""LoRA as the recipes use it: on q, k, v, o and both stacks of expert weights of every layer."""

import re
from typing import Any

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

    Where the flags name no targets, LoRA adapts q, k, v and o of the attention and both stacks of
    expert weights. "all-linear" is no more than that: the router is no torch.nn.Linear, and PEFT
    leaves out the head.
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


def upcast_trained_copies(model: torch.nn.Module) -> None:
    """Put PEFT's copies of --lora_modules_to_save into fp32, as LoRA's own factors are.

    PEFT 0.21 copies them in the base's bf16, in which most updates at a rate of 2e-5 are too small
    to change a number. What they return keeps the base's dtype, and so do all layers after them.
    """
    for name, module in model.named_modules():
        if not name.endswith("modules_to_save.default"):
            continue
        dtype = next(module.parameters()).dtype
        module.float()
        if isinstance(module, torch.nn.Embedding):  # autocast casts what a matrix product returns
            module.register_forward_hook(_cast_output_to(dtype))


def _cast_output_to(dtype: torch.dtype) -> Any:
    return lambda module, inputs, output: output.to(dtype)
