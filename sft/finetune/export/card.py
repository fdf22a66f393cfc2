"""The model card, README.md of an artifact or an export: what it is, how it is used, how it was
trained and evaluated, how faithful it is.

It names models and datasets of the hub. Of folders it names the last part alone: the others are
nobody else's business.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from finetune.checkpoint.artifact import ARTIFACT, CARD
from finetune.checkpoint.fingerprint import RunRecord
from finetune.checkpoint.summary_file import SUMMARY
from finetune.data.files import format_of
from finetune.export.base import is_commit
from finetune.export.card_figures import count_rows, evaluation_section, fidelity_rows, table
from finetune.export.card_usage import Usage, usage_section
from finetune.export.record import ExportRecord, Format
from finetune.export.source import RunWeights
from finetune.model.weights import BaseWeights

DESCRIPTIONS = {
    "adapter": "A LoRA adapter in PEFT's format, experts included (`target_parameters`)",
    "bf16": "All weights in bf16",
    "mxfp4": "All weights, the experts re-quantised to MXFP4 in the layout of the published "
    "checkpoint",
    "gguf": "All weights as one GGUF file for llama.cpp, Ollama and LM Studio, the experts "
    "re-quantised to MXFP4",
    "gguf-adapter": "A LoRA adapter as a GGUF file for llama.cpp, experts included",
}
LIBRARIES = {"adapter": "peft", "gguf": "gguf", "gguf-adapter": "gguf"}  # transformers otherwise
# Of the run's record: what the card names elsewhere.
NOT_SHOWN = {"model", "model_revision", "dataset", "dataset_sha256"}


def write_card(
    output: Path, run_weights: RunWeights, base: BaseWeights, record: ExportRecord, *, name: str
) -> None:
    """Write the card of an export. name: of the exported model, on the hub if it is uploaded."""
    run, summary = run_weights.record, run_weights.summary
    measured = [
        evaluation_section(run_weights.folder, output, summary),
        fidelity_section(record),
    ]
    origin = f" From `{record.origin}`, step {record.step}."
    text = card_text(run, base, summary, measured, form=record.format, name=name, origin=origin)
    (output / CARD).write_text(text)


def card_of_artifact(
    artifact: Path, run: RunRecord, base: BaseWeights, summary: dict[str, Any]
) -> str:
    """The card of a run's own result, whose plot of the loss is drawn already.

    summary: what summary.json will hold.
    """
    measured = [evaluation_section(artifact, artifact, summary)]
    form: Format = "adapter" if run.use_peft else "bf16"
    name = default_name(artifact)
    return card_text(run, base, summary, measured, form=form, name=name, origin="")


def update_evaluation(artifact: Path) -> None:
    """Put the figures of evaluation.json into the card of a run's own result.

    An earlier version's card stays as it is: its hash is in summary.json.
    """
    summary = json.loads((artifact / SUMMARY).read_text())
    file = artifact / CARD
    if CARD in summary.get("files", {}) or not file.is_file():
        return
    before, title, after = file.read_text().partition("\n## Licence\n")
    before = re.sub(r"\n## Evaluation\n.*?(?=\n## |\Z)", "", before, flags=re.DOTALL)
    section = evaluation_section(artifact, artifact, summary)
    file.write_text(f"{before.rstrip()}\n\n{section}\n{title}{after}")


def card_text(
    run: RunRecord,
    base: BaseWeights,
    summary: dict[str, Any],
    measured: list[str],
    *,
    form: Format,
    name: str,
    origin: str,
) -> str:
    """All of a card. measured: its sections on evaluation and fidelity, some of them empty."""
    is_mxfp4 = any(tensor.endswith("_blocks") for tensor in base.files)
    usage = Usage(
        where=name if "/" in name else ".",
        name=re.sub(r"[^\w.-]", "-", name.rpartition("/")[2]),
        base=base_name(run),
        revision=run.model_revision if is_commit(run.model_revision) else "",
        base_is_mxfp4=is_mxfp4,
        rank=run.lora.get("lora_r") if run.use_peft else None,
    )
    here = "" if "/" in name else " The examples are run in the folder of this card."
    experts = ", whose experts are in MXFP4," if is_mxfp4 else ""
    sections = [
        front_matter(run, form),
        f"# {name}\n\n{DESCRIPTIONS[form]}: {usage.base}{experts} fine-tuned on "
        f"{dataset_name(run)}.{origin}{here}",
        usage_section(form, usage),
        "## Training\n\n" + table(training_rows(run) | count_rows(summary)),
        *measured,
        "## Licence\n\nApache 2.0, as that of gpt-oss.",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def front_matter(run: RunRecord, form: Format) -> str:
    """The YAML that the hub reads. It names models and datasets of the hub, never local folders."""
    fields: dict[str, Any] = {
        "license": "apache-2.0",
        "library_name": LIBRARIES.get(form, "transformers"),
        "pipeline_tag": "text-generation",
        "tags": ["gpt-oss", "harmony", "sft", "trl", *(["lora"] if run.use_peft else [])],
    }
    if is_commit(run.model_revision):
        fields["base_model"] = run.model
        is_adapter = form in ("adapter", "gguf-adapter")
        fields["base_model_relation"] = "adapter" if is_adapter else "finetune"
    # A dataset may be followed by its split, revision or number of repetitions.
    datasets = [re.split(r"[:@*]", source)[0] for source in run.dataset.split(",")]
    if all(map(is_on_hub, datasets)):
        fields["datasets"] = datasets
    return "---\n" + yaml.safe_dump(fields, sort_keys=False) + "---"


def training_rows(run: RunRecord) -> dict[str, Any]:
    """What the run was trained with, by the labels of the card's table."""
    rows = {"base model": base_name(run), "its revision": run.model_revision}
    for name, value in run.to_json().items():
        if name not in NOT_SHOWN and value not in (None, ""):
            rows[name.replace("_", " ")] = value
    return rows


def fidelity_section(record: ExportRecord) -> str:
    if record.fidelity is None:
        return "## Fidelity\n\nNot compared with the trained model (`--verify false`)."
    text = f"Loaded from disk and compared with the trained model on {record.text}."
    parts = ["## Fidelity", text, table(fidelity_rows(record.fidelity)), *record.hints]
    return "\n\n".join(parts)


def base_name(run: RunRecord) -> str:
    """The base's name on the hub; of a folder only the last part of its path."""
    return run.model if is_commit(run.model_revision) else Path(run.model).name


def dataset_name(run: RunRecord) -> str:
    """Names on the hub as they are; of paths and URLs only the last part."""
    parts = run.dataset.split(",")
    return ", ".join(part if is_on_hub(part) else Path(part).name for part in parts)


def is_on_hub(source: str) -> bool:
    """Whether this is a dataset's OWNER/NAME on the hub, and no path of a file."""
    name = re.split(r"[:@*]", source)[0]
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return is_name and format_of(name) is None and not Path(name).exists()


def default_name(run_dir: Path) -> str:
    """The name of the run's folder, also if the folder of its artifact is given."""
    run_dir = run_dir.resolve()
    return run_dir.parent.name if run_dir.name == ARTIFACT else run_dir.name
