"""Read an exported GGUF file back, to compare it with the trained model.

Blocks of MXFP4 are decoded by the gguf package, which knows nothing of the published layout.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize

from finetune.errors import UserError
from finetune.export.gguf_layout import name_map, parts_of
from finetune.export.merge import MergedWeights, add
from finetune.model.loading import load_config
from finetune.model.weights import CPU


class GgufFile:
    """A GGUF file's tensors in fp32, by their names in it. Raises UserError if it is damaged."""

    def __init__(self, file: Path) -> None:
        try:
            self.reader = GGUFReader(file)
        except (OSError, ValueError, IndexError) as error:
            raise UserError(f"{file} cannot be read as GGUF: {error}") from error
        self.file = file
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def rows(self, name: str, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if name not in self.tensors:
            raise UserError(f"{self.file} lacks {name}")
        tensor = self.tensors[name]
        return torch.from_numpy(dequantize(np.array(tensor.data[start:stop]), tensor.tensor_type))

    def number(self, key: str) -> float:
        """The value of a key of the header."""
        return float(self.reader.fields[key].contents())


class GgufWeights:
    """The weights of GptOssForCausalLM that a GGUF file holds, or that its adapter makes of the
    base: a WeightSource.
    """

    def __init__(self, merged: MergedWeights, file: Path) -> None:
        config = load_config(merged.base.model_id, revision=merged.base.revision)
        self.merged, self.file = merged, GgufFile(file)
        self.names = name_map(config.num_hidden_layers)
        self.is_adapter = "adapter.lora.alpha" in self.file.reader.fields

    def shape(self, name: str) -> torch.Size:
        return self.merged.shape(name)

    def is_packed(self, name: str) -> bool:
        """False: they are unpacked as they are read."""
        return False

    def dense(
        self, name: str, *, start: int = 0, stop: int | None = None, device: torch.device = CPU
    ) -> torch.Tensor:
        first, last, _ = slice(start, stop).indices(self.shape(name)[0])
        weight = torch.empty((last - first, *self.shape(name)[1:]), dtype=torch.bfloat16)
        for begin, end in self.merged.chunks(name, start=first, stop=last):
            weight[begin - first : end - first] = self.rows(name, start=begin, stop=end)
        return weight.to(device)

    def rows(
        self, name: str, *, start: int = 0, stop: int | None = None, device: torch.device = CPU
    ) -> torch.Tensor:
        if not self.is_adapter:
            return self.joined(name, self.file.rows, start, stop).to(device, torch.bfloat16)
        weights = self.merged.base.dense(name, start=start, stop=stop)
        if name in self.merged.targets:
            weights = add(weights, self.joined(name, self.delta, start, stop))
        return weights.to(device)

    def joined(
        self, name: str, read: Callable[..., torch.Tensor], start: int, stop: int | None
    ) -> torch.Tensor:
        """What `read` gives for the tensors of this weight, in the published layout."""
        parts = [(p, read(p.name, start=start, stop=stop)) for p in parts_of(name, self.names)]
        if len(parts) == 1:
            values = parts[0][1]
        else:  # gate and up, of the weights (E, out, in) or of the biases (E, out)
            values = torch.stack([rows for _, rows in parts], dim=2).flatten(1, 2)
        return values.transpose(1, 2) if self.merged.is_experts(name) else values

    def delta(self, name: str, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """What llama.cpp adds to these rows: (stop - start, in), of experts (E, out, in)."""
        a, b = self.file.rows(f"{name}.lora_a"), self.file.rows(f"{name}.lora_b")
        scaling = self.file.number("adapter.lora.alpha") / b.shape[-1]
        if b.ndim == 2:
            return (b @ a * scaling)[start:stop]
        return torch.bmm(b[start:stop], a[start:stop]) * scaling
