"""Turn a run into what serves: an adapter, merged bf16 weights, or MXFP4 as gpt-oss is published.

    python sft/export.py /checkpoints/gpt-oss-20b-lora --format mxfp4 --output ./my-model

Source: the run's final artifact or else its newest whole checkpoint, also while it trains on. No
GPU is needed, and memory for one stack of experts: 120b takes under 16 GB. Then the artifact is
loaded from disk and compared with the trained model, which takes memory for the whole model (20b:
about 45 GB) and, without a GPU, minutes: `--verify false` leaves it out. A call that was
interrupted goes on where it was when repeated.

The adapter needs no other layout for vLLM than PEFT's, read there (2026-11) in
vllm/lora/model_manager.py, LoRAModelManager._stack_moe_lora_weights, at commit
01533aa8f9c07da9766323fbaf4c8b81bb2aa958: `experts.base_layer` is gate_up_proj, `experts` is
down_proj, lora_A is reshaped to (E, r, in), lora_B to (out, r, E); gate and up stay interleaved.
vLLM asserts that both are adapted, and takes no modules_to_save: limits_of says so.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from finetune.command_line import CommandLine


@dataclass
class ExportArguments:
    """What to export, and where to."""

    format: Literal["adapter", "bf16", "mxfp4"] = field(
        metadata={"help": "LoRA's adapter; all weights in bf16; all, experts in MXFP4."}
    )
    output: Path = field(metadata={"help": "A folder on a local disk, new or of this export."})
    model: str | None = field(
        default=None, metadata={"help": "Where the base model is now, if it has moved."}
    )
    verify: bool = field(
        default=True, metadata={"help": "Load the artifact and compare it with the trained model."}
    )
    num_examples: int = field(default=8, metadata={"help": "Conversations to compare on."})
    push_to_hub: str | None = field(default=None, metadata={"help": "OWNER/NAME, uploaded to."})
    private: bool = field(default=True, metadata={"help": "The hub's repository, if it is new."})


def command_line() -> CommandLine:
    parser = CommandLine(ExportArguments, description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder, for example /checkpoints/NAME")
    return parser


if __name__ == "__main__":
    arguments, rest = command_line().parse_args_into_dataclasses()  # before imports that take 8 s

import json
import shutil
from typing import Any

from huggingface_hub import HfApi
from peft import LoraConfig

from finetune.checkpoint.fingerprint import model_revision
from finetune.errors import UserError, one_line_errors
from finetune.export.card import default_name, fidelity_rows, write_card
from finetune.export.divergence import Rows
from finetune.export.hub import check_hub, push
from finetune.export.merge import MergedWeights, adapted_skeleton, find_targets
from finetune.export.samples import conversations_of_run
from finetune.export.shards import write_shard, write_weights
from finetune.export.source import ADAPTER, RunWeights, find_run_weights, read_names
from finetune.model.loading import load_config, load_tokenizer
from finetune.model.weights import BaseWeights
from finetune.summary import print_summary

RECORD = "export.json"
# Of config.json where the base itself is not quantized; as openai/gpt-oss-20b has it.
QUANTIZATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


def export(run_dir: Path, args: ExportArguments) -> None:
    """The whole command. Raises UserError for whatever a user can mend."""
    api = check_hub(args.push_to_hub) if args.push_to_hub else None
    record = read_record(args.output)
    trained = find_run_weights(run_dir, origin=record.get("origin"), check=args.verify)
    if args.format == "adapter" and not trained.is_adapter:
        raise UserError("this run trained all weights, it has no adapter: --format bf16 or mxfp4")
    base = open_base(trained, args.model)
    merged, lora = open_merged(trained, base)
    check_record(record, args, trained)
    args.output.mkdir(parents=True, exist_ok=True)
    record = identity(args, trained)
    (args.output / RECORD).write_text(json.dumps(record | {"finished": False}, indent=2))
    print(f"{args.format} of {trained.folder}, step {trained.step}, to {args.output}", flush=True)
    write_small_files(base, args)
    if lora is not None and args.format == "adapter":
        write_adapter(trained, lora, args.output)
    else:
        write_weights(merged, args.output, form=args.format)
    if args.verify:
        rows, record["text"] = conversations_of_run(trained, base, num_examples=args.num_examples)
        record |= verify(merged, rows, args)
    limits = limits_of(trained, lora) if args.format == "adapter" else []
    record["hints"] = [*record.get("hints", []), *limits]
    finish(record, trained, args, name=default_name(run_dir))
    if api is not None:
        upload(api, args)


def read_record(output: Path) -> dict[str, Any]:
    """What an earlier call has begun there. Raises UserError if the folder holds anything else."""
    if not output.exists() or not any(output.iterdir()):
        return {}
    try:
        return json.loads((output / RECORD).read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{output} holds something else than an export: give --output a new folder"
        ) from None


def identity(args: ExportArguments, trained: RunWeights) -> dict[str, Any]:
    """What makes two calls the same export."""
    return {
        "format": args.format,
        "origin": trained.origin,
        "step": trained.step,
        "fingerprint": trained.record.identity(),
    }


def check_record(record: dict[str, Any], args: ExportArguments, trained: RunWeights) -> None:
    """Raise UserError if the folder holds another export than this one."""
    wanted = identity(args, trained)
    if record and {name: record.get(name) for name in wanted} != wanted:
        raise UserError(
            f"{args.output} holds an export as {record['format']} of step {record['step']} or of "
            "another run: give another --output"
        )


def open_base(trained: RunWeights, moved: str | None) -> BaseWeights:
    """The model that was trained, of the very revision. Raises UserError if it is not there."""
    model, revision = trained.record.model, trained.record.model_revision
    is_commit = len(revision) == 40
    model_id = moved or model
    if Path(model_id).is_dir():
        found = model_revision(model_id, revision="main")
        if not is_commit and found != revision:
            raise UserError(
                f"{model_id} is not the model that was trained: its revision is {found}, "
                f"not {revision}"
            )
        base = BaseWeights(model_id)
        read_names(sorted(set(base.files.values())))
        return base
    if not is_commit and moved is None:
        raise UserError(f"the base model {model} is not there: say where it is with --model")
    return BaseWeights(model_id, revision=revision if is_commit else "main")


def open_merged(trained: RunWeights, base: BaseWeights) -> tuple[MergedWeights, LoraConfig | None]:
    """The merged weights and, for LoRA, the adapter's configuration."""
    if not trained.is_adapter:
        return MergedWeights(base, trained, {}), None
    config = load_config(base.model_id, revision=base.revision)
    skeleton = adapted_skeleton(config, trained.lora_config())
    lora = skeleton.peft_config["default"]
    lora.base_model_name_or_path, lora.inference_mode = trained.record.model, True
    return MergedWeights(base, trained, find_targets(skeleton)), lora


def write_small_files(base: BaseWeights, args: ExportArguments) -> None:
    """Tokenizer with its chat template, config, generation config."""
    load_tokenizer(base.model_id, revision=base.revision).save_pretrained(args.output)
    if args.format == "adapter":
        return
    config = json.loads((base.folder / "config.json").read_text())
    quantization = config.pop("quantization_config", QUANTIZATION)
    config |= {"architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    config.pop("torch_dtype", None)  # its older name
    if args.format == "mxfp4":
        config["quantization_config"] = quantization
    (args.output / "config.json").write_text(json.dumps(config, indent=2))
    if (base.folder / "generation_config.json").exists():
        shutil.copyfile(
            base.folder / "generation_config.json", args.output / "generation_config.json"
        )


def write_adapter(trained: RunWeights, lora: LoraConfig, output: Path) -> None:
    """As PEFT's save_pretrained does, from tensors that no model holds."""
    write_shard({name: trained.rows(name) for name in trained.shapes}, output / ADAPTER)
    lora.save_pretrained(output)


def limits_of(trained: RunWeights, lora: LoraConfig | None) -> list[str]:
    """What keeps vLLM from loading the adapter."""
    assert lora is not None
    experts = [name for name in trained.shapes if ".experts." in name and "lora_A" in name]
    limits = []
    if experts and 2 * sum(".base_layer." in name for name in experts) != len(experts):
        limits.append("vLLM loads LoRA on both expert parameters only: serve this as bf16 or mxfp4")
    if lora.modules_to_save:
        limits.append("vLLM takes no modules_to_save: serve this as bf16 or mxfp4")
    return limits


def verify(merged: MergedWeights, rows: Rows, args: ExportArguments) -> dict[str, Any]:
    """How faithful the artifact is, and what follows from it."""
    from finetune.export.fidelity import (
        measure_fidelity,  # PEFT and transformers in full, which --verify false spares
    )

    fidelity = measure_fidelity(args.output, merged, rows, form=args.format)
    hints = []
    if args.format == "mxfp4":
        lost = fidelity["kl"] - fidelity["kl_bf16"]
        hints.append(
            f"re-quantisation costs {lost:.2e} nats a token of KL and "
            f"{fidelity['loss'] - fidelity['loss_bf16']:+.4f} of loss; training moved the model by "
            f"{fidelity['effect_kl']:.2e}"
        )
        if merged.trained.is_adapter and fidelity["kl"] > 0.1 * fidelity["effect_kl"]:
            hints.append(
                "that is over a tenth of what was learnt: better keep the adapter separate, beside "
                "the published MXFP4 base (--format adapter), or serve bf16"
            )
    return {"fidelity": fidelity, "hints": hints}


def finish(
    record: dict[str, Any], trained: RunWeights, args: ExportArguments, *, name: str
) -> None:
    """The card, the table and, last, the record that says that the rest is whole."""
    if args.push_to_hub:
        name = args.push_to_hub
    write_card(args.output, trained, form=args.format, name=name, record=record)
    (args.output / RECORD).write_text(json.dumps(record | {"finished": True}, indent=2))
    rows = {"source": f"{trained.origin}, step {trained.step}", "artifact": str(args.output)}
    print_summary(rows | fidelity_rows(record.get("fidelity", {})), title=f"{args.format}: {name}")
    for hint in record["hints"]:
        print(hint, flush=True)


def upload(api: HfApi, args: ExportArguments) -> None:
    assert args.push_to_hub is not None
    print(push(api, args.output, args.push_to_hub, private=args.private), flush=True)


if __name__ == "__main__":
    with one_line_errors():
        export(rest.run, arguments)
