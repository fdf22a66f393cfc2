"""Is what answers what was trained? Compares a running server with a run.

    python sft/verify_served.py http://localhost:8000 RUN [--model NAME]

RUN is the folder of a run, or its `final`. The server is vLLM, SGLang, llama.cpp's server or
another one with OpenAI's API; the key is taken from API_KEY. Its log-probabilities at some places
of the conversations that the run held out are compared with those of the trained model and of the
base. It ends with status 0 if the server answers as trained, 1 if not, and 2 if that cannot be
told.

The first call runs the models here, which takes memory for the packed base (14 GB for 20b) and,
without a GPU, minutes; what it computes is kept in RUN. Beside a server that fills the GPU, set
CUDA_VISIBLE_DEVICES= to run them on the CPU.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.command_line import CommandLine


@dataclass
class VerifyArguments:
    """Which model to ask, and how much."""

    model: str | None = field(
        default=None,
        metadata={"help": "Its name at the server; by default RUN's name, or the only one there."},
    )
    base: str | None = field(
        default=None, metadata={"help": "Where the base model is now, if it has moved."}
    )
    num_examples: int = field(default=8, metadata={"help": "How many conversations to use."})
    num_places: int = field(default=64, metadata={"help": "At how many places of them to compare."})
    max_error: float | None = field(
        default=None,
        metadata={"help": "Nats from the trained model that the server's format may add."},
    )


def command_line() -> CommandLine:
    parser = CommandLine(VerifyArguments, description=__doc__)
    parser.add_argument("url", help="of the server, for example http://localhost:8000")
    parser.add_argument("run", type=Path, help="the folder of a run, or its `final`")
    return parser


if __name__ == "__main__":
    arguments, rest = command_line().parse_args_into_dataclasses()  # before imports that take 8 s

import os
import sys

from transformers import PreTrainedTokenizerBase

from finetune.errors import UserError, one_line_errors
from finetune.export.base import open_base
from finetune.export.card import default_name
from finetune.export.merge import MergedWeights, open_merged
from finetune.export.samples import conversations_of_run
from finetune.export.served_client import Client, Refusal
from finetune.export.served_reference import (
    Place,
    Reference,
    identity_of,
    keep,
    make_reference,
    read_reference,
)
from finetune.export.served_template import template_problem
from finetune.export.served_verdict import Verdict, judge_places
from finetune.export.source import find_run_weights
from finetune.model.loading import load_tokenizer
from finetune.summary import print_summary

STATUS = {True: 0, False: 1, None: 2}


def verify(url: str, run_dir: Path, args: VerifyArguments) -> Verdict:
    """Ask the server, compare, and print the figures and the verdict. Raises UserError."""
    name = default_name(run_dir)
    check_flags(args)
    client = Client(url, key=os.environ.get("API_KEY"), model=args.model, preferred=name)
    run_weights = find_run_weights(run_dir)
    base = open_base(run_weights.record, moved_to=args.base)
    tokenizer = load_tokenizer(base.model_id, revision=base.revision)
    merged, _ = open_merged(run_weights, base)
    reference = load_reference(run_dir, merged, args)
    served = ask(client, reference.places, tokenizer)
    verdict = judge_places(reference.places, served, max_error=args.max_error)
    problem = template_problem(client, tokenizer)
    if problem is not None and verdict.ok:
        verdict = Verdict(False, problem, verdict.rows)
    rows = {label: as_number(value) for label, value in verdict.rows.items()}
    print_summary(
        {"server": client.shown_url, "model": client.model} | rows, title=f"{name}, served"
    )
    print(verdict.text, flush=True)
    return verdict


def check_flags(args: VerifyArguments) -> None:
    """Raise UserError for numbers that compare nothing, or let everything pass."""
    if min(args.num_examples, args.num_places) < 1:
        raise UserError("--num_examples and --num_places must be at least 1")
    if args.max_error is not None and not 0 < args.max_error < float("inf"):
        raise UserError(f"--max_error {args.max_error} is no distance in nats, such as 0.05")


def ask(
    client: Client, places: list[Place], tokenizer: PreTrainedTokenizerBase
) -> list[dict[int, float]]:
    """The server's log-probabilities at each place, by token id; none at a place that it refuses,
    because its context is shorter than the conversation. Raises UserError if it refuses all.
    """
    served: list[dict[int, float]] = []
    refusals = []
    for place in places:
        try:
            served.append(client.next_log_probs(place.tokens, tokenizer))
        except Refusal as refusal:
            served.append({})
            refusals.append(refusal)
    if len(refusals) == len(places):
        raise refusals[0]
    if refusals:
        print(f"{len(refusals)} of {len(places)} places left out: {refusals[0]}", flush=True)
    num_without = sum(not given for given in served) - len(refusals)
    if num_without:
        print(f"{num_without} of {len(places)} places without log-probabilities", flush=True)
    return served


def load_reference(run_dir: Path, merged: MergedWeights, args: VerifyArguments) -> Reference:
    """The reference kept in the run's folder, or a new one, which is kept there."""
    identity = identity_of(merged, num_examples=args.num_examples, num_places=args.num_places)
    reference = read_reference(run_dir, identity)
    if reference is None:
        print("running the trained model and the base, to compare with", flush=True)
        record, base = merged.run_weights.record, merged.base
        rows, text = conversations_of_run(record, base, num_examples=args.num_examples)
        print(f"compared on {text}", flush=True)
        reference = make_reference(merged, rows, identity, num_places=args.num_places)
        keep(reference, run_dir)
    return reference


def as_number(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


if __name__ == "__main__":
    with one_line_errors(status=STATUS[None]):
        sys.exit(STATUS[verify(rest.url, rest.run, arguments).ok])
