"""What each rank reads and keeps of a checkpoint, and the memory it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from helpers.paths import CPU_ENVS, REPO
from tiny_gpt_oss import random_mxfp4

MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mostly experts, 403 MB in bf16 and 107 MB in MXFP4; a file for each layer."""
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


def load(checkpoint: Path, config: str, how: str, file: Path, **envs: str) -> list[dict[str, int]]:
    """What four ranks take to load it: "peak" and "after", in bytes."""
    command = [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        f"--config_file={REPO / 'sft' / config}",
        *("--num_machines=1", "--num_processes=4", "--main_process_port=0"),
        *(str(REPO / "tests/helpers/loading_memory.py"), str(checkpoint), how, str(file)),
    ]
    paths = os.pathsep.join((CPU_ENVS["PYTHONPATH"], str(REPO / "sft")))
    # What is freed is given back at once.
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = os.environ | CPU_ENVS | allocator | {"PYTHONPATH": paths} | envs
    subprocess.run(command, env=environment, check=True)
    return json.loads(file.read_text())


def size_of(checkpoint: Path, *, dequantized: bool) -> int:
    """Bytes of all weights, in bf16 or as they are stored."""
    total = 0
    for file in checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if dequantized and name.endswith("_blocks"):
                total += 4 * tensor.nbytes
            elif not (dequantized and name.endswith("_scales")):
                total += tensor.nbytes
    return total


def test_no_rank_holds_the_whole_model(checkpoint: Path, tmp_path: Path) -> None:
    """A quarter of it in fp32 is half of it in bf16; one stack of experts more while it reads."""
    whole = size_of(checkpoint, dequantized=True)
    for rank in load(checkpoint, "fsdp2.yaml", "recipe", tmp_path / "figures.json"):
        assert whole / 2 <= rank["after"] + 8 * MIB
        assert rank["peak"] < 0.75 * whole


def test_a_packed_base_is_all_that_is_held(checkpoint: Path, tmp_path: Path) -> None:
    """Beyond the model less than a file of it."""
    packed = size_of(checkpoint, dequantized=False)
    largest = max(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    for rank in load(checkpoint, "ddp.yaml", "recipe", tmp_path / "figures.json"):
        assert rank["after"] < packed + 8 * MIB
        assert rank["peak"] < packed + largest
