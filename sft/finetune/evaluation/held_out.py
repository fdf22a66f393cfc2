"""What a finished run is evaluated on: its record, the conversations it held out, and prompts."""

import json
import os
import random
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from finetune.checkpoint.contents import naming
from finetune.checkpoint.fingerprint import RunRecord
from finetune.checkpoint.summary_file import REMEDY, SUMMARY, read_summary
from finetune.data.dataset import load_conversations
from finetune.data.harmony import Encoder
from finetune.data.options import DataArguments
from finetune.errors import UserError
from finetune.evaluation.generation import Prompt, make_prompt


def finished_run(artifact: Path) -> RunRecord:
    """The record of the run that left this artifact.

    Raises UserError if there is no run, it has not finished, or it has left no record; and for a
    file of the artifact that is not as it was written.
    """
    run_dir = artifact.parent
    if not run_dir.is_dir():
        raise UserError(f"there is no run at {run_dir}: give the folder that training wrote to")
    if os.path.lexists(artifact) and not artifact.is_dir():
        raise UserError(f"{artifact} is not a folder: {REMEDY}")
    if not os.path.lexists(artifact / SUMMARY):
        raise UserError(
            f"the run at {run_dir} has not finished: {artifact} has no complete {SUMMARY}; "
            "launch it again, it goes on from its newest checkpoint"
        )
    summary = read_summary(artifact)
    if "run" not in summary:
        raise UserError(f"{artifact / SUMMARY} does not say what was trained: train once more")
    with naming(artifact / SUMMARY):
        return RunRecord.from_json(summary["run"], file=artifact / SUMMARY)


def held_out_conversations(run: RunRecord, dataset: str | None) -> Dataset:
    """The conversations that the run evaluated on or, if given, all of another dataset.

    Raises UserError if the run held none out and no dataset is given.
    """
    if dataset is not None:
        return load_conversations(dataset)
    if run.eval_strategy == "no":
        raise UserError(
            "the run held nothing out: give --dataset FILE_OR_NAME, or train with "
            "--eval_strategy epoch --test_split_size 0.02"
        )
    _, rows = run.load_splits()
    assert rows is not None
    return rows


def sample_prompts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, count: int
) -> list[Prompt]:
    """Prompts of up to `count` conversations, drawn at random with a fixed seed.

    Conversations without a user's turn are passed over.
    """
    encoder = Encoder(tokenizer)
    prompts: list[Prompt] = []
    for index in random.Random(0).sample(range(len(rows)), len(rows)):
        if len(prompts) >= count:
            break
        prompt = make_prompt(json.loads(rows[index]["conversation"]), encoder, data_args)
        if prompt is not None:
            prompts.append(prompt)
    return prompts
