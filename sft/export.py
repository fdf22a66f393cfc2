"""Turn a run into what serves: an adapter, merged bf16 weights, MXFP4 as gpt-oss is published, or
GGUF for llama.cpp.

On the node:

    ~/sft-env/bin/python /sft/export.py /checkpoints/RUN_NAME --format mxfp4 --output ~/my-model

On a laptop, once the run's folder is copied from the bucket:

    .venv/train/bin/python sft/export.py ./RUN_NAME --format mxfp4 --output ./my-model

What is exported is the run's final artifact or, if there is none, its newest complete checkpoint,
also while the run is training. No GPU is needed, and memory for about three stacks of experts: less
than 16 GB for 120b, by arithmetic. Then the artifact is loaded from disk and compared with the
trained model. That takes memory for the whole model (45 GB for 20b, by arithmetic) and, without a
GPU, minutes; `--verify false` leaves it out. If an export was interrupted, call it again: it goes
on where it was.
"""

from dataclasses import dataclass, field
from pathlib import Path

from finetune.command_line import CommandLine
from finetune.export.record import Format


@dataclass
class ExportArguments:
    """What to export, and where to."""

    format: Format = field(
        metadata={
            "help": "adapter: LoRA's alone, as PEFT saves it; bf16: all weights, LoRA merged; "
            "mxfp4: the same, the experts in MXFP4; gguf: the same as one file for llama.cpp and "
            "Ollama; gguf-adapter: LoRA's alone, for llama.cpp."
        }
    )
    output: Path = field(
        metadata={"help": "A folder on a local disk: a new one, or that of the same export."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Where the base model is now, if it has moved."}
    )
    verify: bool = field(
        default=True, metadata={"help": "Load the artifact and compare it with the trained model."}
    )
    num_examples: int = field(
        default=8, metadata={"help": "How many conversations to compare them on."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "OWNER/NAME of a repository on the hub to upload to."}
    )
    private: bool = field(
        default=True,
        metadata={"help": "Refuse a hub's repository that is public; a new one is made private."},
    )


def command_line() -> CommandLine:
    parser = CommandLine(ExportArguments, description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder, for example /checkpoints/NAME")
    return parser


if __name__ == "__main__":
    arguments, rest = command_line().parse_args_into_dataclasses()  # before imports that take 8 s

from collections.abc import Callable

from huggingface_hub import HfApi
from peft import LoraConfig

from finetune.checkpoint.fingerprint import folder_hash
from finetune.errors import UserError, one_line_errors
from finetune.export.adapter import vllm_limits, write_adapter
from finetune.export.base import open_base
from finetune.export.card import default_name, write_card
from finetune.export.card_figures import fidelity_rows
from finetune.export.fidelity import fidelity_hints, measure_fidelity
from finetune.export.files import write_config, write_tokenizer
from finetune.export.gguf_adapter import write_adapter as write_gguf_adapter
from finetune.export.gguf_model import write_model
from finetune.export.hub import check_hub, push
from finetune.export.lock import locked
from finetune.export.merge import MergedWeights, open_merged
from finetune.export.modelfile import write_modelfile
from finetune.export.record import ExportRecord, check_same_export, read_record
from finetune.export.samples import conversations_of_run
from finetune.export.shards import MAX_SHARD_BYTES, write_weights
from finetune.export.source import find_run_weights
from finetune.model.loading import load_tokenizer
from finetune.summary import print_summary


def export(
    run_dir: Path,
    args: ExportArguments,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    connect: Callable[..., HfApi] = HfApi,
) -> None:
    """Check and open all that is read, then fill the output folder and upload it.

    connect: makes the hub's client from a token. Raises UserError for whatever the user can mend.
    """
    # All that can be refused is refused before anything is written.
    if args.num_examples < 1:
        raise UserError("--num_examples must be at least 1; --verify false compares nothing")
    output, form = args.output, args.format
    api = None
    if args.push_to_hub:
        api = check_hub(args.push_to_hub, private=args.private, connect=connect)
    begun = read_record(output)
    origin = begun.origin if begun else None  # so that a newer checkpoint is not mixed in
    run_weights = find_run_weights(run_dir, origin=origin)
    if form in ("adapter", "gguf-adapter") and not run_weights.is_adapter:
        raise UserError(
            "this run trained all weights, it has no adapter: --format bf16, mxfp4 or gguf"
        )
    base = open_base(run_weights.record, moved_to=args.model)
    merged, lora = open_merged(run_weights, base)
    record = ExportRecord(
        form,
        run_weights.origin,
        run_weights.step,
        run_weights.record.identity(),
        weights_sha256=run_weights.weights_sha256,
        base_hash=folder_hash(base.folder),
    )
    check_same_export(begun, record, output)

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be a folder: {error.strerror}") from None
    name = args.push_to_hub or default_name(run_dir)
    with locked(output):
        check_same_export(read_record(output), record, output)  # one may have come first
        record.write(output, finished=False)
        print(f"{form} of {run_weights.folder}, step {run_weights.step}, to {output}", flush=True)
        write_files(merged, lora, output, form=form, name=name, max_shard_bytes=max_shard_bytes)
        if args.verify:
            verify(merged, record, output, num_examples=args.num_examples)
        if form == "adapter" and lora is not None:
            record.hints += vllm_limits(run_weights, lora)
        write_card(output, run_weights, base, record, name=name)
        record.write(output, finished=True)
        print_result(record, output, name)
        if api is not None and args.push_to_hub is not None:
            print(push(api, output, args.push_to_hub, private=args.private), flush=True)


def write_files(
    merged: MergedWeights,
    lora: LoraConfig | None,
    output: Path,
    *,
    form: Format,
    name: str,
    max_shard_bytes: int,
) -> None:
    """Write all that a format consists of, but the card. lora: of a run that has an adapter."""
    base = merged.base
    if form == "adapter" and lora is not None:
        write_tokenizer(base, output)
        write_adapter(merged.run_weights, lora, output)
    elif form == "gguf":
        tokenizer = load_tokenizer(base.model_id, revision=base.revision)
        write_model(merged, tokenizer, output, name=name)
        write_modelfile(output)
    elif form == "gguf-adapter":
        write_gguf_adapter(merged, output, name=name)
    else:
        write_tokenizer(base, output)
        write_config(base, output, form=form)
        write_weights(merged, output, form=form, max_bytes=max_shard_bytes)


def verify(merged: MergedWeights, record: ExportRecord, output: Path, *, num_examples: int) -> None:
    """Compare the files with the trained model, and put into the record what that gives."""
    run_weights, form = merged.run_weights, record.format
    rows, record.text = conversations_of_run(
        run_weights.record, merged.base, num_examples=num_examples
    )
    record.fidelity = measure_fidelity(output, merged, rows, form=form)
    record.hints += fidelity_hints(record.fidelity, form=form, is_adapter=run_weights.is_adapter)


def print_result(record: ExportRecord, output: Path, name: str) -> None:
    """Print where the artifact is and how faithful it is, then the hints."""
    rows = {"source": f"{record.origin}, step {record.step}", "artifact": str(output)}
    print_summary(rows | fidelity_rows(record.fidelity or {}), title=f"{record.format}: {name}")
    for hint in record.hints:
        print(hint, flush=True)


if __name__ == "__main__":
    with one_line_errors():
        export(rest.run, arguments)
