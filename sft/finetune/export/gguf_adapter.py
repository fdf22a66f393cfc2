"""Write a run's LoRA adapter as a GGUF file that llama.cpp loads beside the published base."""

from collections.abc import Callable
from pathlib import Path

import torch

from finetune.errors import UserError
from finetune.export.gguf_layout import name_map, parts_of
from finetune.export.gguf_metadata import adapter_writer
from finetune.export.merge import MergedWeights, Target, expert_factors
from finetune.export.shards import check_space, free_bytes
from finetune.model.loading import load_config

ADAPTER = "adapter.gguf"


def write_adapter(
    merged: MergedWeights,
    output: Path,
    *,
    name: str,
    free_bytes: Callable[[Path], int] = free_bytes,
) -> None:
    """Write output/adapter.gguf. Raises UserError, before anything is written, if the run trained
    more than factors A and B, or if the file does not fit on the disk.

    llama.cpp adds alpha / r times B A to a weight, with one alpha for the whole file. Where PEFT
    scales some weights otherwise, the difference goes into B.
    """
    if merged.replaced:
        raise UserError(
            f"a GGUF adapter holds LoRA's factors alone, and this run has also trained "
            f"{min(merged.replaced)} as a whole: take --format gguf"
        )
    config = load_config(merged.base.model_id, revision=merged.base.revision)
    names = name_map(config.num_hidden_layers)
    alphas = {source: target.scaling * rank(merged, target) for source, target in targets(merged)}
    alpha = next(iter(alphas.values()))
    part = output / f".{ADAPTER}.part"
    writer = adapter_writer(part, name=name, alpha=alpha)
    for source, target in targets(merged):
        a, b = factors(merged, target)
        for piece in parts_of(source, names):
            scaled = b[..., piece.outputs, :] * (alphas[source] / alpha)
            # Gate and up share A: it is in the file twice.
            writer.add_tensor(f"{piece.name}.lora_a", a.numpy())
            writer.add_tensor(f"{piece.name}.lora_b", scaled.contiguous().numpy())
    wanted = sum(tensor.nbytes for tensors in writer.tensors for tensor in tensors.values())
    check_space(output, wanted, free=free_bytes(output))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(output / ADAPTER)


def targets(merged: MergedWeights) -> list[tuple[str, Target]]:
    """The weights that LoRA adapts, in the order of the model."""
    return [(name, merged.targets[name]) for name in merged.names if name in merged.targets]


def rank(merged: MergedWeights, target: Target) -> int:
    return merged.run_weights.shape(target.lora_a)[0] // target.num_experts


def factors(merged: MergedWeights, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as llama.cpp has them, in fp32: (r, in) and (out, r); of a stack of experts
    (E, r, in) and (E, out, r).
    """
    a, b = (merged.run_weights.rows(name) for name in (target.lora_a, target.lora_b))
    return expert_factors(a, b, target) if target.num_experts > 1 else (a.float(), b.float())
