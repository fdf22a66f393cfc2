"""Make one step of a tiny gpt-oss under `accelerate launch`, and write its gathered gradients.

    accelerate launch --config_file sft/fsdp2.yaml tests/helpers/sharded_step.py MODEL all|lora FILE

The file's metadata holds "bytes_moved", the bytes that the collectives gathered and reduced.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import get_peft_model
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from trl import ModelConfig

from finetune.model.experts import EXPERTS_IMPLEMENTATION, use_grouped_lora
from finetune.model.loading import load_model
from finetune.model.lora import lora_config
from finetune.model.weights import BaseWeights, local_rows, shard_and_fill


def make_model(model_id: str, implementation: str, *, use_peft: bool) -> Any:
    """gpt-oss in fp32, with LoRA if wanted. implementation: of its experts."""
    model: Any = load_model(BaseWeights(model_id), attn_implementation="eager").float()
    model.set_experts_implementation(implementation)
    lora = lora_config(model, lora_flags(use_peft=use_peft))
    return model if lora is None else get_peft_model(model, lora)


def lora_flags(*, use_peft: bool) -> ModelConfig:
    return ModelConfig(use_peft=use_peft, lora_r=4, lora_alpha=16, lora_dropout=0.0)


def randomize_adapters(model: torch.nn.Module) -> None:
    """Give LoRA random numbers, as B is zero at first. They do not depend on the sharding."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.empty(parameter.shape).normal_(std=0.1, generator=generator)
            if isinstance(parameter, DTensor):
                start, stop = local_rows(parameter)
                parameter.to_local().detach().copy_(values[start:stop])
            else:
                parameter.detach().copy_(values)


def batch(rank: int) -> dict[str, torch.Tensor]:
    """A rank's conversation of random tokens; every rank has another one."""
    ids = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": ids, "labels": ids}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All gradients, gathered from all ranks, by the names of a model that is not wrapped."""
    named = {}
    for name, parameter in model.named_parameters():
        grad: Any = parameter.grad
        if grad is not None:
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            named[name.replace("_checkpoint_wrapped_module.", "")] = grad.contiguous()
    return named


class BytesMoved(TorchDispatchMode):
    """Adds up the bytes that the collectives gather or reduce."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
        if "allgather" in func.__name__:
            self.total += args[0].nbytes  # its output
        elif "reduce_scatter" in func.__name__:
            self.total += args[1].nbytes  # its input
        return func(*args, **(kwargs or {}))


def main() -> None:
    model_id, what, file = sys.argv[1:]
    accelerator = Accelerator()
    model = make_model(model_id, EXPERTS_IMPLEMENTATION, use_peft=what == "lora")
    if what == "lora":
        use_grouped_lora(model)
        model.enable_input_require_grads()
    model.activation_checkpointing_enable()
    model.train()
    shard_and_fill(accelerator, model, BaseWeights(model_id))
    randomize_adapters(model)
    # accelerate prepares a model for FSDP2 only together with its optimizer.
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    with BytesMoved() as moved:
        accelerator.backward(model(**batch(accelerator.process_index)).loss)
    assert any(isinstance(parameter, DTensor) for parameter in model.parameters())
    gathered = gradients(model)
    if accelerator.is_main_process:
        save_file(gathered, Path(file), metadata={"bytes_moved": str(moved.total)})
    accelerator.wait_for_everyone()
    # Ends at once: a thread of torch 2.13.0's gloo that frees gathered tensors while Python shuts
    # down aborts the process.
    os._exit(0)


if __name__ == "__main__":
    main()
