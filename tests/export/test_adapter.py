"""PEFT's files as vLLM reads them, and what vLLM cannot load."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import load_file

from finetune.errors import UserError
from finetune.export.adapter import vllm_limits, write_adapter
from finetune.export.merge import open_merged
from finetune.export.shards import UNFINISHED
from finetune.export.source import ADAPTER, find_run_weights
from helpers.finished_runs import open_run, peft_model, save_adapter_run


def test_it_is_written_as_the_run_left_it(run_dir: Path, tmp_path: Path) -> None:
    run_weights = find_run_weights(run_dir)
    _, lora = open_merged(run_weights, open_run(run_dir).base)
    assert lora is not None
    write_adapter(run_weights, lora, tmp_path)
    written, trained = (load_file(folder / ADAPTER) for folder in (tmp_path, run_dir / "final"))
    assert written.keys() == trained.keys()
    assert all(written[name].equal(trained[name]) for name in written)
    assert LoraConfig.from_pretrained(tmp_path).r == lora.r


def test_a_full_disk_is_noticed_before_anything_is_written(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    run_weights = find_run_weights(run_dir)
    _, lora = open_merged(run_weights, open_run(run_dir).base)
    assert lora is not None
    size = sum(tensor.nbytes for tensor in load_file(run_dir / "final" / ADAPTER).values())
    with pytest.raises(UserError, match="the export takes"):
        write_adapter(run_weights, lora, output, free_bytes=lambda _: size - 1)
    assert not list(output.iterdir())
    # What a killed call has left is deleted before the room is measured.
    (output / UNFINISHED).mkdir()
    (output / UNFINISHED / ADAPTER).write_bytes(b"half a file")

    def free_bytes(folder: Path) -> int:
        return 0 if (folder / UNFINISHED).exists() else size

    write_adapter(run_weights, lora, output, free_bytes=free_bytes)


@pytest.mark.parametrize(
    ("flags", "limits"),
    [
        ({}, []),
        ({"lora_target_parameters": ["mlp.experts.down_proj"]}, ["both expert parameters only"]),
        ({"lora_modules_to_save": ["lm_head"]}, ["no modules_to_save"]),
    ],
)
def test_what_vllm_cannot_load_is_named(
    flags: dict[str, Any], limits: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    save_adapter_run(tmp_path, tiny_model, **flags)
    run_weights = find_run_weights(tmp_path)
    _, lora = open_merged(run_weights, open_run(tmp_path).base)
    assert lora is not None
    found = vllm_limits(run_weights, lora)
    assert len(found) == len(limits)
    assert all(part in sentence for part, sentence in zip(limits, found, strict=True))


def vllm_factors(adapter: Path, num_experts: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The factors A and B of each module as vLLM reads them from PEFT's files.

    Experts: (E, rank, in) and (E, out, rank); linear layers: (rank, in) and (out, rank). Restated
    from LoRAModelManager._stack_moe_lora_weights, commit 01533aa8f9c07da9766323fbaf4c8b81bb2aa958.
    """
    tensors = load_file(adapter / "adapter_model.safetensors")
    modules = {name.rsplit(".", 2)[0] for name in tensors}
    factors = {}
    for module in modules:
        a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
        name = module.removeprefix("base_model.model.")
        if name.endswith((".experts", ".experts.base_layer")):
            a = a.reshape(num_experts, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1)
            kind = "gate_up_proj" if name.endswith(".base_layer") else "down_proj"
            name = f"{name.removesuffix('.base_layer')}.{kind}"
        factors[name] = (a, b)
    return factors


def test_vllm_reads_the_same_changes_as_peft(tiny_model: Path, tmp_path: Path) -> None:
    """For each expert vLLM adds scaling * B A x to its output."""
    save_adapter_run(tmp_path, tiny_model, lora_alpha=24)
    model = peft_model(tiny_model, tmp_path)
    num_experts = model.config.num_local_experts
    factors = vllm_factors(tmp_path / "final", num_experts)
    seen = set()
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = path.removeprefix("base_model.model.").replace(".base_layer", "")
        delta = module.get_delta_weight("default")
        if isinstance(module, ParamWrapper):
            name = f"{name}.{module.parameter_name}"
            delta = delta.transpose(1, 2)
        a, b = factors[name]
        torch.testing.assert_close(24 / 4 * (b @ a), delta)
        assert delta.abs().max() > 0
        seen.add(name)
    assert seen == factors.keys()
    assert len(seen) == 2 * 6
