"""The conversations that an export is compared on: those that the run held out, else the first ones
of its training data.
"""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace

from datasets import Dataset

from finetune.checkpoint.fingerprint import RunRecord
from finetune.data.dataset import render_all
from finetune.errors import UserError
from finetune.export.divergence import Rows
from finetune.model.loading import load_tokenizer
from finetune.model.weights import BaseWeights

MAX_TOKENS = 512  # of a conversation; longer ones are cut, because eager attention takes O(T^2)
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
    record: RunRecord, base: BaseWeights, *, num_examples: int
) -> tuple[Rows, str]:
    """At most num_examples conversations, rendered as the run rendered them.

    Also returns a description of them for the card, such as "the first 8 conversations of the
    held-out data". If the dataset cannot be read on this machine, it is one built-in conversation.
    """
    tokenizer = load_tokenizer(base.model_id, revision=base.revision)
    # The loaders print what they do, which does not belong to the result of export.py.
    with redirect_stdout(sys.stderr):
        try:
            rows, part = rows_of_run(record)
            rows = rows.select(range(min(num_examples, len(rows))))
            description = f"the first {len(rows)} conversations of the {part}"
        except UserError as error:
            print(f"a built-in conversation is compared on, for {error}")
            conversation = json.dumps({"messages": BUILT_IN})
            rows = Dataset.from_dict({"conversation": [conversation], "shape": ["messages"]})
            description = "a built-in conversation, for the run's dataset cannot be read here"
        # One sample of each conversation is enough to compare on.
        data_args = replace(record.data, learn_past_thinking=False)
        tokens = render_all(rows, tokenizer, data_args, cut_at=MAX_TOKENS)
    return [{name: row[name] for name in ("input_ids", "labels")} for row in tokens], description


def rows_of_run(record: RunRecord) -> tuple[Dataset, str]:
    """The held-out part of the run's dataset, or all of it if nothing was held out; which it is."""
    rows, held_out = record.load_splits()
    if held_out is None:
        return rows, "training data"
    return held_out, "held-out data"
