"""A run's LoRA adapter in PEFT's format, and what vLLM can do with it.

vLLM loads PEFT's layout as it is. Read in vllm/lora/model_manager.py,
LoRAModelManager._stack_moe_lora_weights, at commit 01533aa8f9c07da9766323fbaf4c8b81bb2aa958
(2026-11): `experts.base_layer` is gate_up_proj and `experts` is down_proj; lora_A is reshaped to
(E, r, in) and lora_B to (out, r, E); gates and ups stay interleaved. vLLM asserts that both
parameters are adapted, and it does not take modules_to_save.
"""

from collections.abc import Callable
from pathlib import Path

from peft import LoraConfig

from finetune.export.shards import check_space, delete_unfinished, free_bytes, write_shard
from finetune.export.source import ADAPTER, RunWeights


def write_adapter(
    run_weights: RunWeights,
    lora: LoraConfig,
    output: Path,
    *,
    free_bytes: Callable[[Path], int] = free_bytes,
) -> None:
    """Write what PEFT's save_pretrained writes, without a model in memory.

    Raises UserError before anything is written if it does not fit on the disk.
    """
    tensors = {name: run_weights.rows(name) for name in run_weights.shapes}
    wanted = sum(tensor.nbytes for tensor in tensors.values())
    delete_unfinished(output)  # before the room is measured
    check_space(output, wanted, free=free_bytes(output))
    write_shard(tensors, output / ADAPTER)
    lora.save_pretrained(output)


def vllm_limits(run_weights: RunWeights, lora: LoraConfig) -> list[str]:
    """Sentences on what keeps vLLM from loading the adapter; none if it can."""
    experts = [name for name in run_weights.shapes if ".experts." in name and "lora_A" in name]
    gate_up = [name for name in experts if ".base_layer." in name]
    limits = []
    if experts and 2 * len(gate_up) != len(experts):
        limits.append("vLLM loads LoRA on both expert parameters only: serve this as bf16 or mxfp4")
    if lora.modules_to_save:
        limits.append("vLLM takes no modules_to_save: serve this as bf16 or mxfp4")
    return limits
