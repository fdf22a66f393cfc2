"""LoRA's factors added to the base's weights, or all weights as trained: some rows at a time.

    W' = W + s A B        in fp32, then rounded to bf16, as PEFT merges into an fp32 base

The layout of PEFT 0.21.2's files for a stack of E experts (in, out) at rank r: lora_A (E r, in)
holds expert after expert, lora_B (out, r E) rank after rank, the expert being the fastest index.
Which of the nested `experts.base_layer` and `experts` is which parameter, PEFT itself is asked.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from transformers import GptOssConfig
from trl import ModelConfig

from finetune.errors import UserError
from finetune.export.source import RunWeights
from finetune.model.loading import meta_model
from finetune.model.lora import lora_config
from finetune.model.weights import BaseWeights

CPU = torch.device("cpu")
ROOT = "base_model.model."  # of names in PEFT's files
CHUNK_BYTES = 2**28  # of weights in fp32 at a time


@dataclass
class Target:
    """An adapted weight: the names of its factors in PEFT's files, and how they multiply."""

    lora_a: str
    lora_b: str
    scaling: float
    num_experts: int


def adapted_skeleton(config: GptOssConfig, lora: LoraConfig | ModelConfig) -> PeftModel:
    """The model with its adapter as PEFT builds it, on the meta device."""
    model = meta_model(config)
    if not isinstance(lora, LoraConfig):
        lora = lora_config(model, lora)
    return get_peft_model(model, lora, low_cpu_mem_usage=True)


def find_targets(skeleton: PeftModel) -> dict[str, Target]:
    """By the name of the base's weight."""
    targets = {}
    for name, module in skeleton.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        path = name.removeprefix(ROOT).replace(".base_layer", "")
        is_parameter = isinstance(module, ParamWrapper)
        targets[f"{path}.{module.parameter_name if is_parameter else 'weight'}"] = Target(
            lora_a=f"{name}.lora_A.weight",
            lora_b=f"{name}.lora_B.weight",
            scaling=module.scaling["default"],
            num_experts=module.num_experts if is_parameter else 1,
        )
    return targets


def expert_delta(
    a: torch.Tensor, b: torch.Tensor, target: Target, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """What the factors add to the experts from start to stop: (stop - start, in, out), fp32."""
    a = a.float().unflatten(0, (target.num_experts, -1))[start:stop]
    b = b.float().unflatten(1, (-1, target.num_experts))[..., start:stop]
    return torch.bmm(a.transpose(1, 2), b.permute(2, 1, 0)) * target.scaling


def linear_delta(a: torch.Tensor, b: torch.Tensor, target: Target) -> torch.Tensor:
    """What the factors add to a linear layer's weight: (out, in), fp32."""
    return b.float() @ a.float() * target.scaling


def add(weights: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """In fp32, rounded to the weights' dtype. Where delta is 0 they keep their bits: -0 + 0 = 0."""
    merged = (weights.float() + delta).to(weights.dtype)
    return torch.where(delta == 0, weights, merged)


class MergedWeights:
    """The trained model's weights, named and laid out as GptOssForCausalLM's, read when asked for.

    Raises UserError if the run holds anything that has no place in the base model, or lacks a
    tensor.
    """

    def __init__(self, base: BaseWeights, trained: RunWeights, targets: dict[str, Target]) -> None:
        self.base, self.trained, self.targets = base, trained, targets
        stored = (name.removesuffix("_blocks").removesuffix("_scales") for name in base.files)
        self.names = list(dict.fromkeys(stored))
        if trained.is_adapter:
            wanted = {name for t in targets.values() for name in (t.lora_a, t.lora_b)}
            self.replaced = {name for name in self.names if ROOT + name in trained.shapes}
            wanted |= {ROOT + name for name in self.replaced}
        else:
            self.replaced = wanted = set(self.names)
        odd = sorted(wanted ^ trained.shapes.keys())
        if odd:
            raise UserError(
                f"{trained.folder} does not fit {base.model_id!r}: {len(odd)} tensors are "
                f"missing or unknown, {odd[0]} first"
            )

    def num_rows(self, name: str) -> int:
        return self.shape(name)[0]

    def shape(self, name: str) -> torch.Size:
        """Experts: (E, in, out)."""
        if name in self.replaced:
            return self.trained.shapes[name if not self.trained.is_adapter else ROOT + name]
        if self.base.is_packed(name):
            num_experts, out, groups, half = self.base.shape(f"{name}_blocks")
            return torch.Size((num_experts, groups * half * 2, out))
        return self.base.shape(name)

    def is_experts(self, name: str) -> bool:
        return len(self.shape(name)) == 3

    def delta(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor | None:
        """What LoRA adds to these rows, in fp32; None if it does not."""
        target = self.targets.get(name)
        if target is None:
            return None
        a, b = self.trained.rows(target.lora_a), self.trained.rows(target.lora_b)
        if target.num_experts > 1:
            return expert_delta(a, b, target, start, stop)
        return linear_delta(a, b, target)[start:stop]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        if name in self.replaced:
            key = ROOT + name if self.trained.is_adapter else name
            return self.trained.rows(key, start, stop).to(torch.bfloat16)
        weights = self.base.dense(name, device=CPU, start=start, stop=stop)
        delta = self.delta(name, start, stop)
        return weights if delta is None else add(weights, delta)

    def chunks(self, name: str) -> Iterator[tuple[int, int]]:
        """First row and the one after the last, as many at a time as CHUNK_BYTES holds."""
        shape = self.shape(name)
        step = max(1, CHUNK_BYTES // (4 * shape[1:].numel()))
        for start in range(0, shape[0], step):
            yield start, min(start + step, shape[0])

    def dense(self, name: str, **where: Any) -> torch.Tensor:
        """A whole weight; of what is computed on the way, only a chunk is held beside it."""
        whole = torch.empty(self.shape(name), dtype=torch.bfloat16)
        for start, stop in self.chunks(name):
            whole[start:stop] = self.rows(name, start, stop)
        return whole.to(where.get("device", CPU))

    def is_packed(self, name: str) -> bool:
        """As weights.fill asks a Checkpoint: these are bf16."""
        return False
