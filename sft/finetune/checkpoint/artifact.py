"""What a finished run leaves for the next tool: bf16 weights or a PEFT adapter, a tokenizer."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed import barrier, is_initialized, new_group
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.checkpoint.bucket import await_upload

ARTIFACT = "final"
SUMMARY = "summary.json"
EVALUATION = "evaluation.json"
LOSS_PLOT = "loss.png"


def save_artifact(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    artifact: Path,
    summary: dict[str, Any],
) -> None:
    """Write what the next tool loads: bf16 HF weights or a PEFT adapter, and the tokenizer.

    Called by every process; the first writes. summary.json comes last, when the rest is in the
    bucket, and says so (no rename: on a mounted bucket that is a copy of every file).
    """
    # The upload of 234 GB may take longer than any collective of training.
    patient = new_group(backend="gloo", timeout=timedelta(days=1)) if is_initialized() else None
    state_dict = gather_trained_weights(accelerator, model)
    if accelerator.is_main_process:
        (artifact / SUMMARY).unlink(missing_ok=True)
        # Else transformers names the bf16 experts as it found them: _blocks, which nothing can
        # load.
        accelerator.unwrap_model(model).save_pretrained(
            artifact, state_dict=state_dict, save_original_format=False
        )
        fix_saved_config(artifact)
        tokenizer.save_pretrained(artifact)
        files = sorted(path for path in artifact.iterdir() if path.is_file())
        await_upload(files)
        sizes = {path.name: path.stat().st_size for path in files}
        (artifact / SUMMARY).write_text(json.dumps(summary | {"files": sizes}, indent=2))
        await_upload([artifact / SUMMARY])
    if patient is not None:
        barrier(group=patient)


def fix_saved_config(artifact: Path) -> None:
    """What transformers writes of a model whose weights were fp32, and which had no use of a cache,
    is not true of what it is given to save.
    """
    file = artifact / "config.json"
    if file.exists():
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"dtype": "bfloat16", "use_cache": True}, indent=2))


def is_finished(artifact: Path) -> bool:
    """Whether save_artifact came to its end there, and all that it wrote is there."""
    try:
        files = json.loads((artifact / SUMMARY).read_text()).get("files", {})
        return all((artifact / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError):
        return False


def gather_trained_weights(
    accelerator: Accelerator, model: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """Whole tensors on the first process's CPU: all weights in bf16, or LoRA's alone as they are.

    FSDP2's shards are gathered one tensor at a time, so that no GPU holds more than one whole
    tensor.
    """
    if accelerator.distributed_type == "DEEPSPEED":
        return accelerator.get_state_dict(model)
    unwrapped = accelerator.unwrap_model(model)
    is_adapter = hasattr(unwrapped, "peft_config")
    state_dict = {}
    for name, tensor in unwrapped.state_dict().items():
        if is_adapter and not is_trained(name):
            continue
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if accelerator.is_main_process:
            state_dict[name] = whole.cpu() if is_adapter else whole.to(torch.bfloat16).cpu()
    return state_dict


def is_trained(name: str) -> bool:
    """Whether a PEFT model's state_dict entry belongs to the adapter."""
    return "lora_" in name or "modules_to_save" in name
