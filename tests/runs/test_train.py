"""Complete runs of train.py on two real processes."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

from helpers.launching import Launch, losses


def test_a_full_run_is_sharded_and_not_trained_again_once_finished(
    launch: Launch, tmp_path: Path
) -> None:
    # W&B is used only if there is a key; here there is none, and its other variables do not matter.
    envs = {"WANDB_API_KEY": "", "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    cache = tmp_path / "cache"
    result = launch(
        "fsdp2.yaml", f"--output_dir={tmp_path / 'run'}", HF_DATASETS_CACHE=str(cache), **envs
    )
    assert not list(tmp_path.glob("wandb/*"))
    # Tokenised by one rank only: the other one read its cache.
    assert len(list(cache.rglob("generator-train.arrow"))) == 1
    assert len(list(cache.rglob("cache-*.arrow"))) == 2  # tokens; TRL's packing
    assert result.returncode == 0, result.stderr
    assert len(losses(result.stdout)) == 4
    assert "processes: 2" in result.stdout

    shards = tmp_path / "run/checkpoint-2"
    assert {file.name for file in shards.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    tensors = FileSystemReader(shards).read_metadata().state_dict_metadata
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    assert len(weights) > 30
    for name, tensor in weights.items():
        assert isinstance(tensor, TensorStorageMetadata)
        assert len(tensor.chunks) == 2, f"{name} is not sharded over both ranks"

    again = launch("fsdp2.yaml", "--output_dir", str(tmp_path / "run"))
    assert again.returncode == 0, again.stderr
    assert "this run had finished at step 4" in again.stdout
    assert losses(again.stdout) == []


def test_lora_trains_with_a_sharded_bf16_base_only(launch: Launch, tmp_path: Path) -> None:
    flags = ("fsdp2_lora.yaml", "--use_peft=true", "--lora_r=4", "--lora_dropout=0")
    refused = launch(*flags, num_processes=1)
    assert refused.returncode != 0
    assert "error: an MXFP4 base is not sharded" in refused.stderr
    assert "--dequantize true" in refused.stderr

    result = launch(*flags, "--dequantize=true", "--learning_rate=3e-2")
    assert result.returncode == 0, result.stderr
    assert losses(result.stdout)[-1] < losses(result.stdout)[0]
    adapter = load_file(tmp_path / "run/final/adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for tensor in adapter.values())


@pytest.mark.long
@pytest.mark.skipif(
    shutil.which("c++") is None, reason="DeepSpeed builds its AdamW for the CPU with a C++ compiler"
)
def test_zero3_with_offload_trains_and_leaves_loadable_weights(
    launch: Launch, tmp_path: Path
) -> None:
    result = launch("zero3_offload.yaml")
    assert result.returncode == 0, result.stderr
    assert losses(result.stdout)[-1] < losses(result.stdout)[0]
    states = (tmp_path / "run/checkpoint-4/global_step4").glob("*_optim_states.pt")
    assert len(list(states)) == 2
    _, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run/final", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
