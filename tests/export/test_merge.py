"""LoRA merged as PEFT merges it; PEFT's files as vLLM reads them; memory for one stack."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import load_file
from transformers import GptOssForCausalLM, Mxfp4Config

from helpers.finished_runs import open_run, save_adapter_run
from helpers.paths import REPO


def peft_model(tiny_model: Path, run_dir: Path) -> Any:
    """In fp32, in which PEFT's sums are those of merge.py."""
    base = GptOssForCausalLM.from_pretrained(
        tiny_model, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    return PeftModel.from_pretrained(base, run_dir / "final")


@pytest.mark.parametrize("flags", [{}, {"use_rslora": True}, {"lora_modules_to_save": ["lm_head"]}])
def test_merged_as_peft_merges(flags: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    save_adapter_run(tmp_path, tiny_model, **flags)
    merged = open_run(tmp_path)
    expected = peft_model(tiny_model, tmp_path).merge_and_unload().state_dict()
    assert set(merged.names) == expected.keys()
    base = merged.base
    for name in merged.names:
        actual = merged.dense(name)
        # Sums in another order can round to the neighbour.
        torch.testing.assert_close(actual, expected[name].bfloat16(), rtol=2**-7, atol=1e-6)
        assert (actual != expected[name].bfloat16()).float().mean() < 1e-3
        is_changed = not actual.equal(base.dense(name, device=torch.device("cpu")))
        adapted = name in merged.targets or name in merged.replaced
        assert is_changed == adapted, name
    assert len(merged.targets) == 2 * 6  # of a layer: q, k, v, o, both stacks


def vllm_factors(adapter: Path, num_experts: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What vLLM makes of the files, restated from LoRAModelManager._stack_moe_lora_weights (commit
    01533aa8f9c07da9766323fbaf4c8b81bb2aa958): by module, A as (E, rank, in) and B as (E, out, rank)
    of experts, (rank, in) and (out, rank) of linear layers.
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


def test_vllm_reads_the_same_deltas(tiny_model: Path, tmp_path: Path) -> None:
    """Expert by expert: vLLM adds scaling * B A x to what the expert gives."""
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


PEAK = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from finetune.export import merge
from finetune.export import shards
from helpers.finished_runs import open_run
run, output, form, num_layers = sys.argv[1:]
merge.CHUNK_BYTES = 2**21  # an expert
merged = open_run(Path(run))
layers = tuple(f"model.layers.{number}." for number in range(int(num_layers)))
merged.names = [name for name in merged.names if name.startswith(layers)]
stack = 2 * max(merged.shape(name).numel() for name in merged.names)
Path(output).mkdir()
shards.stored_tensors(merged, merged.names[0], form="bf16")
def rss():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = rss()
shards.write_weights(merged, Path(output), form=form, max_bytes=stack)
print(stack, rss() - before, sum(2 * merged.shape(name).numel() for name in merged.names))
"""


@pytest.mark.parametrize(("form", "num_layers", "stacks"), [("bf16", 8, 3), ("mxfp4", 4, 2)])
def test_memory_for_one_stack(form: str, num_layers: int, stacks: int, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_wide_base(base)
    save_adapter_run(tmp_path / "run", base)
    paths = [str(REPO / folder) for folder in ("sft", "tests", "tests/rehearsal")]
    code = f"import sys; sys.path[:0] = {paths!r}\n{PEAK}"
    command = [sys.executable, "-c", code, str(tmp_path / "run"), str(tmp_path / "out"), form]
    command.append(str(num_layers))
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    stack, peak, whole = map(int, printed.split("\n")[-2].split())
    # bf16: a stack, as much again that is being written, what a chunk takes, what malloc keeps.
    assert peak < stacks * stack < whole / 2, (stack, peak, whole)


def save_wide_base(folder: Path) -> None:
    """gpt-oss with stacks of 24 MiB, so that what else a process holds does not matter."""
    from tiny_gpt_oss import conversation_texts, save_tiny_gpt_oss

    texts = conversation_texts(REPO / "tests/rehearsal/conversations.jsonl")[:20]
    sizes = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 768}
    save_tiny_gpt_oss(folder, texts, num_local_experts=16, **sizes)
