"""A checkpoint's weights, each rank reading what it keeps: all of them on its GPU or its shards."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import fsdp2_prepare_model
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssModel, GptOssRotaryEmbedding

from finetune.errors import UserError
from finetune.model.mxfp4 import Mxfp4Weight


class BaseWeights:
    """The safetensors files of a hub name or a folder. Raises UserError if they cannot be had."""

    def __init__(self, model_id: str, *, revision: str = "main") -> None:
        self.model_id, self.revision = model_id, revision
        folder = Path(model_id) if Path(model_id).is_dir() else download(model_id, revision)
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            files = json.loads(index.read_text())["weight_map"]
            self.files = {name: folder / file for name, file in files.items()}
        elif (folder / "model.safetensors").exists():
            with safe_open(folder / "model.safetensors", "pt") as file:
                self.files = dict.fromkeys(file.keys(), folder / "model.safetensors")
        else:
            raise UserError(
                f"the weights of {model_id!r} cannot be read: no safetensors in {folder}"
            )

    def is_packed(self, name: str) -> bool:
        """Whether a stack of experts is stored as MXFP4 blocks and scales."""
        return f"{name}_blocks" in self.files

    def shape(self, name: str) -> torch.Size:
        """Of a stored tensor."""
        with safe_open(self.files[name], "pt") as file:
            return torch.Size(file.get_slice(name).get_shape())

    def rows(
        self, name: str, *, device: torch.device, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """Part of a stored tensor along its first dimension, nothing else of it read."""
        if name not in self.files:
            raise UserError(f"the weights of {self.model_id!r} lack {name}")
        with safe_open(self.files[name], "pt") as file:
            return file.get_slice(name)[start:stop].to(device)

    def packed(self, name: str, **where: Any) -> Mxfp4Weight:
        """A stack of experts (E, in, out) as it is stored."""
        blocks, scales = (self.rows(f"{name}_{part}", **where) for part in ("blocks", "scales"))
        return Mxfp4Weight(blocks, scales)

    def dense(self, name: str, **where: Any) -> torch.Tensor:
        """A weight as floats, unpacked if it is packed."""
        if not self.is_packed(name):
            return self.rows(name, **where)
        return self.packed(name, **where).dense()


def download(model_id: str, revision: str) -> Path:
    """Once a node, into the hub's cache."""
    with PartialState().local_main_process_first():
        try:
            # Published repositories hold the same weights in other layouts too.
            ignored = ["original/*", "metal/*"]
            return Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    allow_patterns=["*.safetensors", "*.json"],
                    ignore_patterns=ignored,
                )
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"the weights of {model_id!r} cannot be read; {str(error).splitlines()[0]}"
            ) from error


def fill(
    model: torch.nn.Module, checkpoint: BaseWeights, *, device: torch.device, dequantize: bool
) -> None:
    """Give a model made on the meta device its weights, on device; MXFP4 stays as it is, frozen,
    unless dequantize is set.
    """
    for name, parameter in list(model.named_parameters()):
        if checkpoint.is_packed(name) and not dequantize:
            weight = torch.nn.Parameter(checkpoint.packed(name, device=device), requires_grad=False)
        else:
            values = checkpoint.dense(name, device=device).to(parameter.dtype)
            weight = torch.nn.Parameter(values.contiguous())
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module).register_parameter(leaf, weight)
    restore_buffers(model, device)


def shard_and_fill(
    accelerator: Accelerator, model: torch.nn.Module, checkpoint: BaseWeights
) -> None:
    """FSDP2 of a model on the meta device; then each rank reads its rows of every weight.

    Raises UserError if there are more ranks than rows to share out.
    """
    fsdp2_prepare_model(accelerator, model)
    model.to_empty(device=accelerator.device)
    # Every rank draws the same numbers for an adapter, and keeps its rows of them.
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        num_rows, num_gpus = parameter.shape[0], parameter.device_mesh.size()
        if math.ceil(num_rows / num_gpus) * (num_gpus - 1) >= num_rows:
            # accelerate 1.15.0 tells parameters apart by their addresses, and empty ones have none.
            raise UserError(
                f"{name} has {num_rows} rows, too few for {num_gpus} GPUs to share: use fewer"
            )
        start, stop = local_rows(parameter)
        if "lora_" in name:
            values = initial_adapter(name, parameter.shape, generator)[start:stop]
        else:
            stored = name.removeprefix("base_model.model.").replace(".base_layer", "")
            values = checkpoint.dense(stored, device=accelerator.device, start=start, stop=stop)
        parameter.to_local().detach().copy_(values)
    restore_buffers(model, accelerator.device)


def local_rows(parameter: DTensor) -> tuple[int, int]:
    """The first of this rank's rows of a parameter that is sharded by rows, and the one after."""
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return offset[0], offset[0] + shape[0]


def initial_adapter(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """As PEFT's LoraLayer.reset_lora_parameters has it: A random, B zero."""
    if "lora_B" in name:
        return torch.zeros(shape)
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), math.sqrt(5), generator=generator)


def restore_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """What no checkpoint holds: the rotary embedding's frequencies."""
    decoder = next(module for module in model.modules() if isinstance(module, GptOssModel))
    decoder.rotary_emb = GptOssRotaryEmbedding(decoder.config).to(device)
