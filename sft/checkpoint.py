"""Where a run stands: its newest good checkpoint, and the artifact it leaves."""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from errors import UserError

ARTIFACT = "final"
SUMMARY = "summary.json"


def newest_checkpoint(run_dir: str | Path) -> str | None:
    """The newest checkpoint under run_dir that can be resumed from; skips torn ones, names them."""
    folders = Path(run_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        problem = find_problem(folder)
        if problem is None:
            return str(folder)
        print(f"checkpoint {folder} is skipped: {problem}", flush=True)
    return None


def find_problem(folder: Path) -> str | None:
    """Why this checkpoint cannot be resumed, or None; trainer_state.json is written last."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return "trainer_state.json is missing or torn"
    if state["global_step"] != int(folder.name.split("-")[-1]):
        return f"trainer_state.json is of step {state['global_step']}"
    for shards in (*folder.glob("pytorch_model_fsdp_*"), *folder.glob("optimizer_*")):
        if shards.is_dir() and not (shards / ".metadata").is_file():
            return f"{shards.name}/.metadata is missing"
    return None


def resume_from(flag: str | None, run_dir: str) -> str | None:
    """The checkpoint --resume_from_checkpoint means: `true` is the newest good one, a path itself.

    The first process looks, so that all resume from the same one. Raises UserError if a path is
    given that cannot be resumed from.
    """
    if flag is None or flag.lower() == "false":
        return None
    if flag.lower() == "true":
        found = [newest_checkpoint(run_dir) if PartialState().is_main_process else None]
        return broadcast_object_list(found)[0]
    problem = find_problem(Path(flag))
    if problem is not None:
        raise UserError(f"--resume_from_checkpoint {flag}: {problem}")
    return flag


class RunFinished(Exception):
    """The checkpoint resumed from already holds every step of the run."""


class StopIfFinished(TrainerCallback):
    """Raise RunFinished where Trainer would train a step too many (seen in transformers 5.23.0)."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise RunFinished


def save_artifact(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    artifact: Path,
    summary: dict[str, Any],
) -> None:
    """Write what the next tool loads: bf16 HF weights or a PEFT adapter, and the tokenizer.

    Called by every process; the first writes. summary.json comes last and says that the rest is
    whole (no rename: on a mounted bucket that is a copy of every file).
    """
    state_dict = gather_trained_weights(accelerator, model)
    if accelerator.is_main_process:
        # Else transformers names the bf16 experts as it found them: _blocks, which nothing can
        # load.
        accelerator.unwrap_model(model).save_pretrained(
            artifact, state_dict=state_dict, save_original_format=False
        )
        tokenizer.save_pretrained(artifact)
        (artifact / SUMMARY).write_text(json.dumps(summary, indent=2))
    accelerator.wait_for_everyone()


def is_finished(artifact: Path) -> bool:
    """Whether save_artifact came to its end there."""
    return (artifact / SUMMARY).is_file()


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
