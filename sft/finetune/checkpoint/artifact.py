"""The artifact of a finished run: bf16 weights or a PEFT adapter, the tokenizer and a summary."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch.distributed import all_gather_object, get_world_size, is_initialized, new_group
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.checkpoint.bucket import await_upload
from finetune.checkpoint.fence import FencedOff
from finetune.checkpoint.summary_file import SUMMARY, intact_summary, write_summary
from finetune.errors import UserError
from finetune.model.loading import save_tokenizer

ARTIFACT = "final"
EVALUATION = "evaluation.json"
LOSS_PLOT = "loss.png"
CARD = "README.md"


def save_artifact(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    artifact: Path,
    summary: dict[str, Any],
    card: str | None = None,
    check_fence: Callable[[], None] = lambda: None,
    await_upload: Callable[[list[Path]], None] = await_upload,
) -> None:
    """Write bf16 weights or a PEFT adapter, the tokenizer, and last of all summary.json.

    Called by every process; the first one writes. summary.json is written when the other files are
    in the bucket, and so an artifact with a summary.json is complete. (Not a folder renamed at the
    end: on a mounted bucket a rename copies every file.) Raises UserError if a write fails.

    card: the text of README.md, in place of PEFT's blank one.
    check_fence: raises FencedOff in the first process if a newer launch continues the run; then it
    is raised in every process.
    """
    # The upload of 120b's 234 GB may take longer than the timeout of training's collectives.
    patient = new_group(backend="gloo", timeout=timedelta(days=1)) if is_initialized() else None
    state_dict = gather_trained_weights(accelerator, model)
    newer = None
    if accelerator.is_main_process:
        try:
            check_fence()
            unwrapped = accelerator.unwrap_model(model)
            write_artifact(
                artifact, unwrapped, state_dict, tokenizer, summary, card, check_fence, await_upload
            )
        except FencedOff as fenced:
            newer = fenced.newer
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"writing the result to {artifact} failed ({str(error).splitlines()[0]}); the "
                "checkpoints are kept: mend that and launch again, and only the result is written"
            ) from error
    if patient is not None:
        everyones = [None] * get_world_size(patient)
        all_gather_object(everyones, newer, group=patient)
        newer = everyones[0]
    if newer is not None:
        raise FencedOff(newer)


def write_artifact(
    artifact: Path,
    model: PreTrainedModel,
    state_dict: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    summary: dict[str, Any],
    card: str | None,
    check_fence: Callable[[], None],
    await_upload: Callable[[list[Path]], None],
) -> None:
    """The first process's part of save_artifact. Raises OSError or SafetensorError if a file cannot
    be written, FencedOff if a newer launch came while the files were written or uploaded.
    """
    # An earlier launch may have left one; until the end this artifact is not complete.
    (artifact / SUMMARY).unlink(missing_ok=True)
    # save_original_format=True would name the bf16 experts as the published checkpoint names
    # its MXFP4 ones, *_blocks, and nothing could load them.
    model.save_pretrained(artifact, state_dict=state_dict, save_original_format=False)
    fix_saved_config(artifact)
    save_tokenizer(tokenizer, artifact)
    if card is not None:
        (artifact / CARD).write_text(card)
    files = sorted(path for path in artifact.iterdir() if path.is_file())
    await_upload(files)
    check_fence()
    # The card is for people, who may edit it, and evaluate.py writes its figures to both. The plot
    # may show less in a launch that only writes the result again.
    lasting = [file for file in files if file.name not in (CARD, EVALUATION, LOSS_PLOT)]
    write_summary(artifact, summary, lasting)
    await_upload([artifact / SUMMARY])


def fix_saved_config(artifact: Path) -> None:
    """Correct two entries of config.json that transformers takes from the model in training: it
    was in fp32 and had no key-value cache, while the saved weights are bf16 and serve with one.

    And sort the set that PEFT 0.21.2 writes in any order: two launches of a run then write the same
    bytes, and neither's upload, however late, damages what the other wrote.
    """
    file = artifact / "config.json"
    if file.exists():
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"dtype": "bfloat16", "use_cache": True}, indent=2))
    file = artifact / "adapter_config.json"
    if file.exists():
        config = json.loads(file.read_text())
        if isinstance(config["target_modules"], list):  # and not a regular expression
            config["target_modules"].sort()
        file.write_text(json.dumps(config, indent=2))


def is_finished(artifact: Path) -> bool:
    """Whether save_artifact ended there, and every file is as its summary says.

    Says which file is not: then the result is to be written again.
    """
    if not os.path.lexists(artifact / SUMMARY):
        return False
    try:
        summary = intact_summary(artifact)
    except ValueError as error:
        print(f"the result is damaged, and written again: {error}", flush=True)
        return False
    # A summary that names no files, as the first version wrote it, still has the run's steps.
    return bool({"files", "steps"} & summary.keys())


def gather_trained_weights(
    accelerator: Accelerator, model: PreTrainedModel
) -> dict[str, torch.Tensor]:
    """Unsharded tensors in the CPU memory of the first process; an empty dict elsewhere.

    All weights in bf16, or only LoRA's in their own dtype. Called by every process. FSDP2's shards
    are gathered one tensor at a time, so that no GPU holds more than one unsharded tensor.
    """
    if accelerator.distributed_type == "DEEPSPEED":
        return accelerator.get_state_dict(model)
    unwrapped = accelerator.unwrap_model(model)
    is_adapter = hasattr(unwrapped, "peft_config")
    state_dict = {}
    for name, tensor in unwrapped.state_dict().items():
        if is_adapter and not is_trained(name):
            continue
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if accelerator.is_main_process:
            state_dict[name] = full.cpu() if is_adapter else full.to(torch.bfloat16).cpu()
    return state_dict


def is_trained(name: str) -> bool:
    """Whether a PEFT model's state_dict entry belongs to the adapter."""
    return "lora_" in name or "modules_to_save" in name
