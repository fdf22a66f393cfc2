"""The tokens that an export is compared on: held out by the run, else the first of its dataset."""

import json
import sys
from contextlib import redirect_stdout

from finetune.data.dataset import load_parts, render_all
from finetune.errors import UserError
from finetune.export.divergence import Rows
from finetune.export.source import RunWeights
from finetune.model.loading import load_tokenizer
from finetune.model.weights import BaseWeights

MAX_TOKENS = 512  # of a conversation
BUILT_IN = [
    {"role": "user", "content": "Why is the sky blue?"},
    {
        "role": "assistant",
        "thinking": "The user asks about Rayleigh scattering. A short answer will do.",
        "content": "Air scatters blue light, whose waves are short, far more than red light. "
        "Looking up, we see that scattered light from every direction.",
    },
]


def conversations_of_run(
    trained: RunWeights, base: BaseWeights, *, num_examples: int
) -> tuple[Rows, str]:
    """input_ids and labels of the conversations, and what they are."""
    from datasets import Dataset

    record = trained.record
    tokenizer = load_tokenizer(base.model_id, revision=base.revision)
    with redirect_stdout(sys.stderr):
        try:
            rows, held_out = load_parts(
                record.script_arguments(),
                eval_strategy=record.eval_strategy,
                test_split_size=record.data.test_split_size,
                seed=record.seed,
            )
            rows, what = (
                (rows, "training data") if held_out is None else (held_out, "held-out data")
            )
            said = f"the first {min(num_examples, len(rows))} conversations of the {what}"
        except UserError as error:
            print(f"a built-in conversation is compared on, for {error}")
            conversation = json.dumps({"messages": BUILT_IN})
            rows = Dataset.from_dict({"conversation": [conversation], "shape": ["messages"]})
            said = "a built-in conversation, for the run's dataset cannot be read here"
        rows = rows.select(range(min(num_examples, len(rows))))
        tokens = render_all(rows, tokenizer, record.data, cut_at=MAX_TOKENS)
    return [{name: row[name] for name in ("input_ids", "labels")} for row in tokens], said
