"""Did it help? Compares the base model and the trained one on what the run held out.

    python sft/evaluate.py RUN [--num_generations 8] [--max_new_tokens 512]
        [--model BASE] [--dataset FILE_OR_NAME]

RUN is the folder of a run, or its `final`. Prints a table of losses by channel and some generated
turns side by side, writes evaluation.json into `final` and the figures into its model card. With
WANDB_API_KEY set, the figures go to the run's own W&B run as well. It runs on one GPU, or on a CPU;
the base of an adapter stays in MXFP4.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.command_line import CommandLine


@dataclass
class EvaluateArguments:
    """What to evaluate, and on what."""

    num_generations: int = field(
        default=8, metadata={"help": "How many turns each model generates."}
    )
    max_new_tokens: int = field(
        default=512, metadata={"help": "Tokens after which a generated turn is cut."}
    )
    model: str | None = field(
        default=None, metadata={"help": "The base model; by default that of the run."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "All of it, instead of what the run held out."}
    )


def command_line() -> CommandLine:
    parser = CommandLine(EvaluateArguments, description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run, or its `final`")
    return parser


if __name__ == "__main__":
    arguments, rest = command_line().parse_args_into_dataclasses()  # before imports that take 8 s

import gc
import json
import os
from typing import Any

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from finetune.checkpoint.artifact import ARTIFACT, EVALUATION
from finetune.checkpoint.contents import naming
from finetune.checkpoint.summary_file import SUMMARY
from finetune.credentials import without_secrets
from finetune.data.dataset import tokenize
from finetune.errors import one_line_errors, only_warn
from finetune.evaluation.comparison import TestSet, compare_evaluations, evaluate_model
from finetune.evaluation.generation import BATCH_SIZE
from finetune.evaluation.held_out import finished_run, held_out_conversations, sample_prompts
from finetune.evaluation.report import print_report, send_to_wandb
from finetune.export.card import update_evaluation
from finetune.model.attention import choose_attention
from finetune.model.experts import use_grouped_lora
from finetune.model.loading import load_model, load_tokenizer
from finetune.model.weights import BaseWeights

DEFAULT_MAX_LENGTH = 4096  # tokens of a packed row, where the run set no --max_length


def evaluate(run_dir: Path, args: EvaluateArguments) -> dict[str, Any]:
    """Write evaluation.json and return what it holds. Raises UserError."""
    artifact = run_dir if os.path.lexists(run_dir / SUMMARY) else run_dir / ARTIFACT
    run = finished_run(artifact)
    rows = held_out_conversations(run, args.dataset)
    tokenizer = load_tokenizer(str(artifact))
    test_set = TestSet(
        tokens=tokenize(rows, tokenizer, run.data, max_length=run.max_length),
        prompts=sample_prompts(rows, tokenizer, run.data, args.num_generations),
        max_length=run.max_length or DEFAULT_MAX_LENGTH,
        max_new_tokens=args.max_new_tokens,
    )

    base = load(args.model or run.model, revision=None if args.model else run.model_revision)
    before = evaluate_model(base, tokenizer, test_set)
    if run.use_peft:
        model = add_adapter(base, artifact)
    else:
        del base
        gc.collect()  # memory may not hold two models at once
        model = load(str(artifact), revision=None)
    after = evaluate_model(model, tokenizer, test_set)

    evaluation = {
        "model": args.model or run.model,
        "dataset": without_secrets(args.dataset or f"{run.dataset}, held out"),
        "conversations": len(test_set.tokens),
        **compare_evaluations(before, after, test_set.prompts),
    }
    print_report(evaluation, title=f"{artifact.parent.resolve().name}: before -> after")
    (artifact / EVALUATION).write_text(json.dumps(evaluation, indent=2, ensure_ascii=False))
    with only_warn("the model card does not have these figures"):
        update_evaluation(artifact)
    if os.environ.get("WANDB_API_KEY"):
        send_to_wandb(evaluation, run_dir=artifact.parent)
    return evaluation


def add_adapter(base: PreTrainedModel, artifact: Path) -> PeftModel:
    """The base with a run's adapter. Raises UserError, naming the file, if it cannot be read."""
    with naming(artifact / "adapter_config.json"):
        lora = LoraConfig.from_pretrained(artifact)
        lora.inference_mode = True
        model = get_peft_model(base, lora)
    file = artifact / "adapter_model.safetensors"
    with naming(file):
        tensors = load_file(file)
        # PEFT says nothing of a tensor that the file lacks: it would stay as it was initialised.
        odd = sorted(tensors.keys() ^ get_peft_model_state_dict(model).keys())
        if odd:
            raise ValueError(f"{odd[0]} is missing or unknown")
        set_peft_model_state_dict(model, tensors)
    use_grouped_lora(model)
    return model


def load(model_id: str, *, revision: str | None) -> PreTrainedModel:
    """A model that scores and generates. revision: a commit on the hub; not used for a folder."""
    weights = BaseWeights(model_id, revision=revision or "main")
    model = load_model(
        weights,
        attn_implementation=choose_attention(),
        dequantize=False,
        num_tokens=BATCH_SIZE,  # generating takes most of the time, with a token of each prompt
    )
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    return model.requires_grad_(False).eval()


if __name__ == "__main__":
    with one_line_errors():
        evaluate(rest.run, arguments)
