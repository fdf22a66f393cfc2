"""The trainer of a tiny gpt-oss in fp32, and its evaluation in several layouts.

python -m torch.distributed.run --standalone --nproc-per-node 2 tiny_trainer.py MODEL FOLDER

The first rank writes FOLDER/evaluations.json: what each layout gave on these ranks.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig

from finetune.checkpoint.saver import Saver
from finetune.model.attention import isolate_packed_sequences
from finetune.preemption import PreemptionNotice
from finetune.training.trainer import ResumableSFTTrainer

LENGTHS = (5, 40, 12, 90, 7)
NUM_IN_LOSS = (1, 30, 2, 80, 3)
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"per_device_eval_batch_size": 1},
    {"per_device_eval_batch_size": 3},
    {"per_device_eval_batch_size": 1, "packing": True},
    {"per_device_eval_batch_size": 2, "packing": True, "max_length": 96},
)


def uneven_rows() -> Dataset:
    """Conversations whose shares in the loss differ: no mean over rows is that of tokens."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length, in_loss in zip(LENGTHS, NUM_IN_LOSS, strict=True):
        ids = torch.randint(20, 500, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * (length - in_loss) + ids[-in_loss:]})
    return Dataset.from_list(examples)


def tiny_gpt_oss(model_folder: Path) -> GptOssForCausalLM:
    """The same random weights in every process."""
    config = GptOssConfig.from_pretrained(model_folder)
    del config.quantization_config
    config._attn_implementation = "eager"
    config.dtype = torch.float32
    torch.manual_seed(0)
    return GptOssForCausalLM(config)


def trainer_of(
    model_folder: Path, rows: Dataset, folder: Path, **flags: object
) -> ResumableSFTTrainer:
    model = tiny_gpt_oss(model_folder)
    isolate_packed_sequences(model)
    defaults = {"max_length": 128, "use_cpu": True, "bf16": False, "eval_strategy": "epoch"}
    defaults |= {"report_to": [], "router_aux_loss_coef": 0.0, "disable_tqdm": True}
    return ResumableSFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), **(defaults | flags)),  # type: ignore[arg-type]
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=PreTrainedTokenizerFast.from_pretrained(model_folder),
        saver=Saver(folder, notice=PreemptionNotice(), every_minutes=5, keep=None, manifest={}),
    )


def evaluations(model_folder: Path, folder: Path) -> list[dict[str, float]]:
    """What an evaluation of the uneven rows reports in each layout."""
    metrics = []
    for layout in LAYOUTS:
        trainer = trainer_of(model_folder, uneven_rows(), folder, **layout)
        trainer.evaluate()
        metrics.append(trainer.state.log_history[-1])
    return metrics


if __name__ == "__main__":
    state = PartialState(cpu=True)
    found = evaluations(Path(sys.argv[1]), Path(sys.argv[2]))
    if state.is_main_process:
        (Path(sys.argv[2]) / "evaluations.json").write_text(json.dumps(found))
    state.wait_for_everyone()
    # Ends at once: a thread of torch 2.13.0's gloo that frees gathered tensors while Python shuts
    # down aborts the process.
    os._exit(0)
