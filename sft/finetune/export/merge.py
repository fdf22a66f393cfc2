"""The trained model's weights, computed from the base and a run: some rows at a time.

For LoRA they are the base's weights W plus the scaled product of the factors A and B,

    W' = W + s A B        in fp32, then rounded to bf16, as PEFT merges into an fp32 base

and for a run that trained all weights they are the run's own.

How PEFT 0.21.2 stores the factors of a stack of E experts (in, out) at rank r: lora_A is (E r, in)
and holds one expert after the other; lora_B is (out, r E), with the expert as the fastest index.
Of the nested modules `experts.base_layer` and `experts`, which one adapts which parameter is read
from a model that PEFT has built.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from transformers import GptOssConfig
from trl import ModelConfig

from finetune.checkpoint.contents import naming
from finetune.errors import UserError
from finetune.export.source import RunWeights
from finetune.model.loading import load_config, meta_model
from finetune.model.lora import lora_config
from finetune.model.weights import CPU, BaseWeights

ROOT = "base_model.model."  # what PEFT puts before the names of the base
CHUNK_BYTES = 2**26  # how much of a weight, in fp32, is computed at a time


@dataclass
class Target:
    """A weight that LoRA adapts: the names of its factors in PEFT's files, and their scaling.

    num_experts: of a stack of experts; 1 for a linear layer.
    """

    lora_a: str
    lora_b: str
    scaling: float
    num_experts: int


def adapted_skeleton(config: GptOssConfig, lora: LoraConfig | ModelConfig) -> PeftModel:
    """The model with its adapter as PEFT builds it, on the meta device.

    lora: the adapter's configuration, or the flags from which train.py makes it.
    """
    model = meta_model(config)
    if not isinstance(lora, LoraConfig):
        lora = lora_config(model, lora)
    return get_peft_model(model, lora, low_cpu_mem_usage=True)


def find_targets(skeleton: PeftModel) -> dict[str, Target]:
    """The weights that LoRA adapts, by their names in the base."""
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


def expert_factors(
    a: torch.Tensor, b: torch.Tensor, target: Target
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (E, r, in) and B (E, out, r) of a stack, in fp32. a: (E r, in), b: (out, r E), as PEFT
    stores them.
    """
    a = a.float().unflatten(0, (target.num_experts, -1))
    return a, b.float().unflatten(1, (-1, target.num_experts)).permute(2, 0, 1)


def expert_delta(
    a: torch.Tensor, b: torch.Tensor, target: Target, start: int = 0, stop: int | None = None
) -> torch.Tensor:
    """What the factors add to the experts from start to stop: (stop - start, in, out), fp32.

    a: (E r, in), b: (out, r E), as PEFT stores them.
    """
    a, b = (factor[start:stop] for factor in expert_factors(a, b, target))
    return torch.bmm(a.transpose(1, 2), b.transpose(1, 2)) * target.scaling


def linear_delta(a: torch.Tensor, b: torch.Tensor, target: Target) -> torch.Tensor:
    """What the factors a (r, in) and b (out, r) add to a linear layer's weight: (out, in), fp32."""
    return b.float() @ a.float() * target.scaling


def add(weights: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """weights + delta, computed in fp32 and rounded to the dtype of the weights."""
    merged = (weights.float() + delta).to(weights.dtype)
    # -0 + 0 is 0. Where nothing is added the weights must keep their bits, so that an unchanged
    # block of MXFP4 is recognised as unchanged.
    return torch.where(delta == 0, weights, merged)


class MergedWeights:
    """The trained model's weights, with the names and shapes of GptOssForCausalLM, all in bf16: a
    WeightSource. Nothing is kept in memory.

    targets: the weights that LoRA adapts; empty if the run trained all weights. chunk_bytes: how
    much of a weight, in fp32, is computed at a time. Raises UserError if the run lacks a tensor, or
    holds one that has no place in the base model.
    """

    def __init__(
        self,
        base: BaseWeights,
        run_weights: RunWeights,
        targets: dict[str, Target],
        *,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.base, self.run_weights, self.targets = base, run_weights, targets
        self.chunk_bytes = chunk_bytes
        stored = (name.removesuffix("_blocks").removesuffix("_scales") for name in base.files)
        self.names = list(dict.fromkeys(stored))
        # Weights that the run holds as a whole: all, or those of LoRA's modules_to_save.
        if run_weights.is_adapter:
            wanted = {name for t in targets.values() for name in (t.lora_a, t.lora_b)}
            self.replaced = {name for name in self.names if ROOT + name in run_weights.shapes}
            wanted |= {ROOT + name for name in self.replaced}
        else:
            self.replaced = wanted = set(self.names)
        odd = sorted(wanted ^ run_weights.shapes.keys())
        if odd:
            raise UserError(
                f"{run_weights.folder} does not fit {base.model_id!r}: {len(odd)} tensors are "
                f"missing or unknown, {odd[0]} first"
            )

    def shape(self, name: str) -> torch.Size:
        if name in self.replaced:
            return self.run_weights.shape(self.name_in_run(name))
        return self.base.shape(name)

    def is_packed(self, name: str) -> bool:
        """False: merged weights are always bf16."""
        return False

    def is_experts(self, name: str) -> bool:
        return len(self.shape(name)) == 3

    def name_in_run(self, name: str) -> str:
        return ROOT + name if self.run_weights.is_adapter else name

    def delta(self, name: str, *, start: int = 0, stop: int | None = None) -> torch.Tensor | None:
        """What LoRA adds to these rows, in fp32; None if it does not adapt this weight."""
        target = self.targets.get(name)
        if target is None:
            return None
        a, b = self.run_weights.rows(target.lora_a), self.run_weights.rows(target.lora_b)
        if target.num_experts > 1:
            return expert_delta(a, b, target, start, stop)
        return linear_delta(a, b, target)[start:stop]

    def rows(
        self, name: str, *, start: int = 0, stop: int | None = None, device: torch.device = CPU
    ) -> torch.Tensor:
        """These rows, computed at once on the CPU; `dense` takes less memory for many of them."""
        if name in self.replaced:
            rows = self.run_weights.rows(self.name_in_run(name), start=start, stop=stop)
            return rows.to(device, torch.bfloat16)
        weights = self.base.dense(name, start=start, stop=stop)
        delta = self.delta(name, start=start, stop=stop)
        return (weights if delta is None else add(weights, delta)).to(device)

    def dense(
        self, name: str, *, start: int = 0, stop: int | None = None, device: torch.device = CPU
    ) -> torch.Tensor:
        """These rows, computed chunk by chunk: beside the result only one chunk is in memory."""
        first, last, _ = slice(start, stop).indices(self.shape(name)[0])
        weight = torch.empty((last - first, *self.shape(name)[1:]), dtype=torch.bfloat16)
        for begin, end in self.chunks(name, start=first, stop=last):
            weight[begin - first : end - first] = self.rows(name, start=begin, stop=end)
        return weight.to(device)

    def chunks(
        self, name: str, *, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Split rows into ranges (first, one after the last) of at most chunk_bytes in fp32."""
        shape = self.shape(name)
        step = max(1, self.chunk_bytes // (4 * shape[1:].numel()))
        stop = shape[0] if stop is None else stop
        for begin in range(start, stop, step):
            yield begin, min(begin + step, stop)


def open_merged(
    run_weights: RunWeights, base: BaseWeights
) -> tuple[MergedWeights, LoraConfig | None]:
    """The merged weights and, if the run trained an adapter, the adapter's configuration."""
    if not run_weights.is_adapter:
        return MergedWeights(base, run_weights, {}), None
    config = load_config(base.model_id, revision=base.revision)
    with naming(run_weights.lora_file):
        skeleton = adapted_skeleton(config, run_weights.lora_config())
    lora = skeleton.peft_config["default"]
    lora.base_model_name_or_path, lora.inference_mode = run_weights.record.model, True
    return MergedWeights(base, run_weights, find_targets(skeleton)), lora
