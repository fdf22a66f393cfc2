"""Weights by name, read when they are asked for, so that no process holds more than it keeps.

WeightSource is what all places that weights come from have in common. BaseWeights is the published
model on disk; `fill` gives a model all of its weights, `shard_and_fill` gives each FSDP2 rank the
rows that it owns.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import fsdp2_prepare_model
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssModel, GptOssRotaryEmbedding

from finetune.errors import UserError
from finetune.model.mxfp4 import BLOCK_SIZE, Mxfp4Weight

CPU = torch.device("cpu")


class WeightSource(Protocol):
    """Named tensors that are read from disk, or computed, each time they are asked for.

    Stacks of experts have the shape (E, in, out), with E experts of "in" inputs and "out" outputs,
    also where they are stored in MXFP4. start and stop select rows, along the first dimension: the
    first one, and the one after the last (None: to the end). The result is on `device`.
    """

    def shape(self, name: str) -> torch.Size:
        """The shape of the whole weight, as `dense` returns it; no values are read."""
        ...

    def is_packed(self, name: str) -> bool:
        """Whether it is stored in MXFP4, as two tensors: `{name}_blocks` and `{name}_scales`."""
        ...

    def rows(
        self, name: str, *, start: int = 0, stop: int | None = None, device: torch.device = CPU
    ) -> torch.Tensor:
        """Rows of a tensor as it is stored; of a packed one, name its blocks or its scales."""
        ...

    def dense(
        self, name: str, *, start: int = 0, stop: int | None = None, device: torch.device = CPU
    ) -> torch.Tensor:
        """Rows of a weight as floats, unpacked if it is stored in MXFP4."""
        ...


def read_packed(
    source: WeightSource,
    name: str,
    *,
    start: int = 0,
    stop: int | None = None,
    device: torch.device = CPU,
) -> Mxfp4Weight:
    """Some experts of a stack that is stored in MXFP4, still packed: (stop - start, in, out)."""
    blocks = source.rows(f"{name}_blocks", start=start, stop=stop, device=device)
    scales = source.rows(f"{name}_scales", start=start, stop=stop, device=device)
    return Mxfp4Weight(blocks, scales)


class BaseWeights:
    """The safetensors files of a hub name or a folder: a WeightSource.

    files: the file of each stored tensor, by the tensor's name. Raises UserError if the weights
    cannot be downloaded or if the folder holds none.
    """

    def __init__(self, model_id: str, *, revision: str = "main") -> None:
        self.model_id, self.revision = model_id, revision
        folder = Path(model_id) if Path(model_id).is_dir() else download(model_id, revision)
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            with reading(index):
                files = json.loads(index.read_text())["weight_map"]
                self.files = {name: folder / file for name, file in files.items()}
        elif (folder / "model.safetensors").exists():
            with tensors_of(folder / "model.safetensors") as file:
                self.files = dict.fromkeys(file.keys(), folder / "model.safetensors")
        else:
            raise UserError(
                f"the weights of {model_id!r} cannot be read: no safetensors in {folder}"
            )

    def is_packed(self, name: str) -> bool:
        return f"{name}_blocks" in self.files

    def shape(self, name: str) -> torch.Size:
        if self.is_packed(name):
            num_experts, out, groups, _ = self.shape(f"{name}_blocks")
            return torch.Size((num_experts, groups * BLOCK_SIZE, out))
        with tensors_of(self.files[name]) as file:
            return torch.Size(file.get_slice(name).get_shape())

    def rows(
        self, name: str, *, start: int = 0, stop: int | None = None, device: torch.device = CPU
    ) -> torch.Tensor:
        """Raises UserError if no tensor of this name is stored."""
        if name not in self.files:
            raise UserError(f"the weights of {self.model_id!r} lack {name}")
        with tensors_of(self.files[name]) as file:
            return file.get_slice(name)[start:stop].to(device)

    def dense(
        self, name: str, *, start: int = 0, stop: int | None = None, device: torch.device = CPU
    ) -> torch.Tensor:
        if self.is_packed(name):
            return read_packed(self, name, start=start, stop=stop, device=device).dense()
        return self.rows(name, start=start, stop=stop, device=device)


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what a damaged file makes a reader raise into a UserError that names the file."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        text = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{file} is damaged or missing ({type(error).__name__}: {text}): fetch it again"
        ) from error


@contextmanager
def tensors_of(file: Path) -> Iterator[Any]:
    """An open safetensors file. Raises UserError, naming it, for what fails while it is open."""
    with reading(file), safe_open(file, "pt") as tensors:
        yield tensors


def download(model_id: str, revision: str) -> Path:
    """Download the weights into the hub's cache, once for all ranks of a node; return their folder.

    Raises UserError if the hub does not give them.
    """
    with PartialState().local_main_process_first():
        try:
            return Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    allow_patterns=["*.safetensors", "*.json"],
                    # OpenAI's repositories hold the same weights again in two other layouts.
                    ignore_patterns=["original/*", "metal/*"],
                )
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"the weights of {model_id!r} cannot be read; {str(error).splitlines()[0]}"
            ) from error


def fill(
    model: torch.nn.Module, source: WeightSource, *, device: torch.device, dequantize: bool
) -> None:
    """Give a model that was made on the meta device its weights, on `device`.

    Weights stored in MXFP4 stay packed and are frozen, unless dequantize is set.
    """
    # A list: registering a parameter changes what named_parameters iterates over.
    for name, parameter in list(model.named_parameters()):
        if source.is_packed(name) and not dequantize:
            packed = read_packed(source, name, device=device)
            weight = torch.nn.Parameter(packed, requires_grad=False)
        else:
            values = source.dense(name, device=device).to(parameter.dtype)
            weight = torch.nn.Parameter(values.contiguous())
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module).register_parameter(leaf, weight)
    restore_buffers(model, device)


def shard_and_fill(accelerator: Accelerator, model: torch.nn.Module, source: WeightSource) -> None:
    """Shard a model that is on the meta device by FSDP2; then each rank reads its own rows.

    The model may be wrapped by PEFT: its adapter is initialised here. All ranks call this. Raises
    UserError if there are more ranks than rows of a weight to share out.
    """
    fsdp2_prepare_model(accelerator, model)
    model.to_empty(device=accelerator.device)
    # Every rank draws the same numbers for the whole adapter and keeps its rows of them, so that
    # the adapter does not depend on the number of ranks.
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        num_rows, num_gpus = parameter.shape[0], parameter.device_mesh.size()
        # FSDP2 gives each rank ceil(num_rows / num_gpus) rows: is anything left for the last one?
        if math.ceil(num_rows / num_gpus) * (num_gpus - 1) >= num_rows:
            # accelerate 1.15.0 identifies parameters by their address, and empty ones have none.
            raise UserError(
                f"{name} has {num_rows} rows, too few for {num_gpus} GPUs to share: use fewer"
            )
        start, stop = local_rows(parameter)
        if "lora_" in name:
            values = initial_adapter(name, parameter.shape, generator)[start:stop]
        else:
            stored = stored_name(name)
            values = source.dense(stored, start=start, stop=stop, device=accelerator.device)
        parameter.to_local().detach().copy_(values)
    restore_buffers(model, accelerator.device)


def stored_name(name: str) -> str:
    """The name in the base's files of a parameter that may have been wrapped by PEFT: adapted by
    LoRA, or copied for --lora_modules_to_save (the copy begins as the original).
    """
    name = re.sub(r"\.(original_module|modules_to_save\.\w+)\b", "", name)
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def local_rows(parameter: DTensor) -> tuple[int, int]:
    """This rank's rows of a parameter sharded by rows: the first, and the one after the last."""
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return offset[0], offset[0] + shape[0]


def initial_adapter(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """The whole of an adapter's tensor as PEFT's LoraLayer.reset_lora_parameters initialises it.

    A is random and B is zero, so that training starts from the base model.
    """
    if "lora_B" in name:
        return torch.zeros(shape)
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), math.sqrt(5), generator=generator)


def restore_buffers(model: torch.nn.Module, device: torch.device) -> None:
    """Compute the rotary embedding's frequencies: buffers that no checkpoint holds."""
    decoder = next(module for module in model.modules() if isinstance(module, GptOssModel))
    decoder.rotary_emb = GptOssRotaryEmbedding(decoder.config).to(device)
