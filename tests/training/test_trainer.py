"""The trainer in one process: what an evaluation reports, and which tokens count in the rates."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig

from finetune.checkpoint.saver import Saver
from finetune.model.attention import isolate_packed_sequences
from finetune.preemption import PreemptionNotice
from finetune.training.trainer import ResumableSFTTrainer

LENGTHS = (5, 40, 12, 90, 7)
NUM_IN_LOSS = (1, 30, 2, 80, 3)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Conversations whose shares in the loss differ: no mean over rows is that of tokens."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length, in_loss in zip(LENGTHS, NUM_IN_LOSS, strict=True):
        ids = torch.randint(20, 500, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * (length - in_loss) + ids[-in_loss:]})
    return Dataset.from_list(examples)


def trainer_of(
    model_folder: Path,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    **flags: object,
) -> ResumableSFTTrainer:
    config = GptOssConfig.from_pretrained(model_folder)
    del config.quantization_config
    config._attn_implementation = "eager"
    config.dtype = torch.float32
    torch.manual_seed(0)
    model = GptOssForCausalLM(config)
    isolate_packed_sequences(model)
    defaults = {"max_length": 128, "use_cpu": True, "bf16": False, "eval_strategy": "epoch"}
    defaults |= {"report_to": [], "router_aux_loss_coef": 0.0, "disable_tqdm": True}
    return ResumableSFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), **(defaults | flags)),  # type: ignore[arg-type]
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        saver=Saver(folder, notice=PreemptionNotice(), every_minutes=5, keep=None, manifest={}),
    )


def test_an_evaluation_is_the_same_for_any_layout_and_is_the_mean_over_tokens(
    tiny_model: Path, rows: Dataset, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    layouts = [
        {"per_device_eval_batch_size": 1},
        {"per_device_eval_batch_size": 3},
        {"per_device_eval_batch_size": 1, "packing": True},
        {"per_device_eval_batch_size": 2, "packing": True, "max_length": 96},
    ]
    metrics = []
    for layout in layouts:
        trainer = trainer_of(tiny_model, rows, tokenizer, tmp_path, **layout)
        trainer.evaluate()
        metrics.append(trainer.state.log_history[-1])
    for name in ("eval_loss", "eval_mean_token_accuracy", "eval_entropy"):
        values = [entry[name] for entry in metrics]
        assert values == pytest.approx([values[0]] * len(layouts), rel=1e-5), name

    model, total = trainer.model.eval(), 0.0
    for row, in_loss in zip(rows, NUM_IN_LOSS, strict=True):
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0, -in_loss - 1 : -1]
        total += torch.nn.functional.cross_entropy(
            logits, ids[0, -in_loss:], reduction="sum"
        ).item()
    assert metrics[0]["eval_loss"] == pytest.approx(total / sum(NUM_IN_LOSS), rel=1e-5)
