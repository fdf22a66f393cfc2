"""Did it help? The base model and what a run made of it, on the conversations the run held out.

    python sft/evaluate.py RUN [--num_generations 8] [--max_new_tokens 512]
        [--model BASE] [--dataset FILE_OR_NAME]

RUN: a run's folder, or its `final`. Prints a table and some turns side by side, and leaves
evaluation.json in `final`; with WANDB_API_KEY it goes to the run's own W&B run too. On one GPU, or
on CPU; an adapter's base stays in MXFP4.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.command_line import CommandLine


@dataclass
class EvaluateArguments:
    """What to evaluate, and on what."""

    num_generations: int = field(default=8, metadata={"help": "Turns to generate, by each model."})
    max_new_tokens: int = field(default=512, metadata={"help": "Of a turn, where it is cut."})
    model: str | None = field(
        default=None, metadata={"help": "The base model; by default that of the run."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "All of it, instead of what the run held out."}
    )


def command_line() -> CommandLine:
    parser = CommandLine(EvaluateArguments, description=__doc__)
    parser.add_argument("run", type=Path, help="a run's folder, or its `final`")
    return parser


if __name__ == "__main__":
    arguments, rest = command_line().parse_args_into_dataclasses()  # before imports that take 8 s

import gc
import json
import os
import random
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from finetune.checkpoint.artifact import ARTIFACT, EVALUATION, SUMMARY
from finetune.checkpoint.fingerprint import RunRecord
from finetune.data.dataset import load_conversations, load_splits, tokenize
from finetune.data.harmony import Encoder
from finetune.data.harmony_parser import ChannelReader
from finetune.data.options import DataArguments
from finetune.errors import UserError, one_line_errors
from finetune.evaluation.generation import Prompt, generate, make_prompt, read_turns, shares
from finetune.evaluation.report import print_report, send_to_wandb
from finetune.evaluation.scoring import compare_scores, score
from finetune.model.attention import choose_attention
from finetune.model.experts import use_grouped_lora
from finetune.model.loading import load_model, load_tokenizer
from finetune.model.weights import BaseWeights


def evaluate(run: Path, args: EvaluateArguments) -> dict[str, Any]:
    """Write evaluation.json and return what it holds. Raises UserError."""
    artifact = run if (run / SUMMARY).is_file() else run / ARTIFACT
    trained = read_run(artifact)
    rows = held_out_conversations(trained, args.dataset)
    tokenizer = load_tokenizer(str(artifact))
    tokens = tokenize(rows, tokenizer, trained.data, max_length=trained.max_length)
    prompts = some_prompts(rows, tokenizer, trained.data, args.num_generations)
    judge = Judge(tokenizer, tokens, prompts, trained.max_length, args.max_new_tokens)

    base = load(args.model or trained.model, None if args.model else trained.model_revision)
    before = judge(base)
    if (artifact / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(base, artifact)
        use_grouped_lora(model)
    else:
        del base
        gc.collect()  # two models need not fit
        model = load(str(artifact), None)
    evaluation = {
        "model": args.model or trained.model,
        "dataset": args.dataset or f"{trained.dataset}, held out",
        "conversations": len(tokens),
        **compare_answers(before, judge(model), prompts),
    }
    (artifact / EVALUATION).write_text(json.dumps(evaluation, indent=2, ensure_ascii=False))
    print_report(evaluation, title=f"{artifact.parent.resolve().name}: before -> after")
    if os.environ.get("WANDB_API_KEY"):
        send_to_wandb(evaluation, run_dir=artifact.parent)
    return evaluation


def compare_answers(
    before: dict[str, Any], after: dict[str, Any], prompts: list[Prompt]
) -> dict[str, Any]:
    """What the Judge found of two models, as evaluation.json has it: pairs of [before, after]."""
    return {
        "loss": compare_scores(before["scores"], after["scores"]),
        "generated": len(prompts),
        **{name: [before["shares"][name], after["shares"][name]] for name in after["shares"]},
        "generations": [
            {"question": prompt.question, "language": prompt.language, "before": old, "after": new}
            for prompt, old, new in zip(prompts, before["turns"], after["turns"], strict=True)
        ],
    }


def read_run(artifact: Path) -> RunRecord:
    """What the run trained on what. Raises UserError."""
    run_dir = artifact.parent
    if not run_dir.is_dir():
        raise UserError(f"there is no run at {run_dir}: give the folder that training wrote to")
    try:
        summary = json.loads((artifact / SUMMARY).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"the run at {run_dir} has not finished: {artifact} has no whole {SUMMARY}; "
            "launch it again, it goes on from its newest checkpoint"
        ) from None
    if "run" not in summary:
        raise UserError(f"{artifact / SUMMARY} does not say what was trained: train once more")
    return RunRecord.from_json(summary["run"], file=artifact / SUMMARY)


def held_out_conversations(trained: RunRecord, dataset: str | None) -> Dataset:
    """The conversations that the run evaluated on, or all of another dataset. Raises UserError."""
    if dataset is not None:
        return load_conversations(dataset)
    if trained.eval_strategy == "no":
        raise UserError(
            "the run held nothing out: give --dataset FILE_OR_NAME, or train with "
            "--eval_strategy epoch --test_split_size 0.02"
        )
    _, rows = load_splits(
        trained.script_arguments(),
        eval_strategy=trained.eval_strategy,
        test_split_size=trained.data.test_split_size,
        seed=trained.seed,
    )
    assert rows is not None
    return rows


def some_prompts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, number: int
) -> list[Prompt]:
    """Of conversations drawn at random, always the same ones."""
    encoder = Encoder(tokenizer)
    order = random.Random(0).sample(range(len(rows)), len(rows))
    prompts: list[Prompt] = []
    for index in order:
        if len(prompts) >= number:
            break
        prompt = make_prompt(json.loads(rows[index]["conversation"]), encoder, data_args)
        prompts += [prompt] if prompt is not None else []
    return prompts


def load(model_id: str, revision: str | None) -> PreTrainedModel:
    """A model that scores and generates. revision: a commit of the hub's, unused for a folder."""
    weights = BaseWeights(model_id, revision=revision or "main")
    model = load_model(weights, attn_implementation=choose_attention(), dequantize=False)
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    return model.requires_grad_(False).eval()


@dataclass
class Judge:
    """What is asked of every model."""

    tokenizer: PreTrainedTokenizerBase
    tokens: Dataset
    prompts: list[Prompt]
    max_length: int | None
    max_new_tokens: int

    def __call__(self, model: PreTrainedModel) -> dict[str, Any]:
        reader = ChannelReader(self.tokenizer)
        model.eval()
        scores = score(model, self.tokens, reader, max_length=self.max_length or 4096)
        limit = self.max_new_tokens
        written = generate(model, self.tokenizer, self.prompts, max_new_tokens=limit)
        turns = read_turns(written, self.prompts, reader)
        return {
            "scores": scores,
            "shares": shares(turns, written, self.prompts, max_new_tokens=limit),
            "turns": [
                {"text": self.tokenizer.decode(ids, skip_special_tokens=False), "problem": problem}
                for ids, problem in zip(written, (turn.problem for turn in turns), strict=True)
            ],
        }


if __name__ == "__main__":
    with one_line_errors():
        evaluate(rest.run, arguments)
