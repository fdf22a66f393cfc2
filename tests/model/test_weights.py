"""The published weights: which rows are read, and how much memory each rank takes to load them."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from finetune.errors import UserError
from finetune.model.mxfp4 import unpack
from finetune.model.weights import BaseWeights
from helpers.launching import launch_command
from helpers.paths import CPU_ENVS, REPO
from tiny_gpt_oss import random_mxfp4

MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of mostly experts, 403 MB in bf16 and 107 MB in MXFP4, with a file for each layer."""
    folder = tmp_path_factory.mktemp("models") / "experts"
    config = GptOssConfig(
        num_hidden_layers=4,
        hidden_size=512,
        intermediate_size=512,
        num_local_experts=64,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        vocab_size=2048,
    )
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        layer = name.split("layers.")[1].split(".")[0] if "layers." in name else "rest"
        tensors = files.setdefault(f"model-{layer}.safetensors", {})
        if parameter.ndim == 3:
            num_experts, inner, out = parameter.shape
            blocks, scales = random_mxfp4(num_experts, out, inner)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            tensors[name] = torch.randn(parameter.shape).bfloat16()
    config.save_pretrained(folder)
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return folder


def load(checkpoint: Path, config: str, how: str, file: Path) -> list[dict[str, int]]:
    """Load it on four ranks; return what each takes, "peak" and "after", in bytes."""
    script = REPO / "tests/helpers/loading_memory.py"
    command = launch_command(
        config, str(checkpoint), how, str(file), num_processes=4, script=script
    )
    # malloc then returns freed memory to the system at once, so that it does not count.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    subprocess.run(command, env=os.environ | CPU_ENVS | allocator, check=True)
    return json.loads(file.read_text())


def size_of(checkpoint: Path, *, dequantized: bool) -> int:
    """The bytes of all weights, in bf16 or as they are stored."""
    total = 0
    for file in checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if dequantized and name.endswith("_blocks"):
                total += 4 * tensor.nbytes
            elif not (dequantized and name.endswith("_scales")):
                total += tensor.nbytes
    return total


@pytest.mark.slow
def test_a_rank_that_shards_never_holds_the_whole_model(checkpoint: Path, tmp_path: Path) -> None:
    """It keeps a quarter of it, in fp32: as much as half of it in bf16. While it reads it holds one
    stack of experts more.
    """
    whole = size_of(checkpoint, dequantized=True)
    for rank in load(checkpoint, "fsdp2.yaml", "recipe", tmp_path / "figures.json"):
        assert whole / 2 <= rank["after"] + 8 * MIB
        assert rank["peak"] < 0.75 * whole


@pytest.mark.slow
def test_loading_a_packed_base_takes_little_more_than_the_base(
    checkpoint: Path, tmp_path: Path
) -> None:
    """At its peak the memory of the packed model, and less than one of its files more."""
    packed = size_of(checkpoint, dequantized=False)
    largest = max(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    for rank in load(checkpoint, "ddp.yaml", "recipe", tmp_path / "figures.json"):
        assert rank["after"] < packed + 8 * MIB
        assert rank["peak"] < packed + largest


def test_any_rows_of_a_weight_are_read_alone(tiny_model: Path) -> None:
    weights, stored = BaseWeights(str(tiny_model)), load_file(tiny_model / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    assert weights.is_packed(name) and name not in stored
    dense = unpack(stored[f"{name}_blocks"], stored[f"{name}_scales"]).transpose(1, 2)
    assert weights.shape(name) == dense.shape
    assert weights.dense(name).equal(dense)
    assert weights.dense(name, start=1, stop=3).equal(dense[1:3])
    blocks = weights.rows(f"{name}_blocks", start=1, stop=3)
    assert blocks.equal(stored[f"{name}_blocks"][1:3])

    name = "model.embed_tokens.weight"
    assert not weights.is_packed(name) and weights.shape(name) == stored[name].shape
    assert weights.dense(name, start=5).equal(stored[name][5:])


def test_a_missing_weight_is_named(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="lack model.layers.9.input_layernorm.weight"):
        BaseWeights(str(tiny_model)).dense("model.layers.9.input_layernorm.weight")
