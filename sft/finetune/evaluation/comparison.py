"""A model evaluated on a test set, and two evaluations beside each other."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from finetune.data.harmony_parser import ChannelReader
from finetune.evaluation.generation import Prompt, generate, read_turns, shares
from finetune.evaluation.scoring import compare_scores, score


@dataclass(frozen=True)
class TestSet:
    """What every model is evaluated on.

    tokens: input_ids and labels of conversations, scored in rows of at most max_length tokens.
    prompts: answered in at most max_new_tokens tokens each.
    """

    __test__ = False  # pytest takes every class named Test... for tests

    tokens: Dataset
    prompts: list[Prompt]
    max_length: int
    max_new_tokens: int


def evaluate_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test_set: TestSet
) -> dict[str, Any]:
    """scores: by channel (scoring.score). turns: one for each prompt. shares: of those turns."""
    reader = ChannelReader(tokenizer)
    prompts, limit = test_set.prompts, test_set.max_new_tokens
    model.eval()
    scores = score(model, test_set.tokens, reader, max_length=test_set.max_length)
    generated = generate(model, tokenizer, prompts, max_new_tokens=limit)
    turns = read_turns(generated, prompts, reader)
    return {
        "scores": scores,
        "shares": shares(turns, generated, prompts, max_new_tokens=limit),
        "turns": [
            {
                "text": tokenizer.decode(ids, skip_special_tokens=False),
                "problem": turn.problem,
            }
            for ids, turn in zip(generated, turns, strict=True)
        ],
    }


def compare_evaluations(
    before: dict[str, Any], after: dict[str, Any], prompts: list[Prompt]
) -> dict[str, Any]:
    """Two results of evaluate_model as evaluation.json holds them: pairs of [before, after]."""
    return {
        "loss": compare_scores(before["scores"], after["scores"]),
        "generated": len(prompts),
        **{name: [before["shares"][name], after["shares"][name]] for name in after["shares"]},
        "generations": [
            {"question": prompt.question, "language": prompt.language, "before": old, "after": new}
            for prompt, old, new in zip(prompts, before["turns"], after["turns"], strict=True)
        ],
    }
