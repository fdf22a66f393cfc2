"""The model card of an export, and the table that a person reads: what it is, how faithful, how to
load it.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from finetune.checkpoint.artifact import ARTIFACT, EVALUATION, LOSS_PLOT
from finetune.export.source import RunWeights
from finetune.summary import as_text

LOADING = {
    "adapter": """base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "{name}")""",
    "bf16": 'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")',
    "mxfp4": 'model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")',
}
WHAT = {
    "adapter": "A LoRA adapter in PEFT's format, experts included (`target_parameters`)",
    "bf16": "All weights in bf16",
    "mxfp4": "All weights, the experts re-quantised to MXFP4 in the layout of the published "
    "checkpoint",
}
LABELS = {
    "num_tokens": "tokens compared",
    "kl": "KL from the trained model, nats a token",
    "kl_bf16": "of that, before re-quantisation (bf16)",
    "top1_agreement": "same most likely token",
    "logits_mean_abs_diff": "logits differ by, on average",
    "logits_max_abs_diff": "logits differ by, at most",
    "loss": "loss",
    "loss_trained": "loss of the trained model",
    "loss_bf16": "loss in bf16",
    "loss_base": "loss of the base model",
    "effect_kl": "for comparison: KL of the base model",
    "experts_effect_kl": "for comparison: KL without what the experts learnt",
    "experts_kept": "of what the experts learnt, kept in the weights",
}
NOT_SHOWN = {"model", "model_revision", "dataset", "dataset_sha256"}


def fidelity_rows(fidelity: dict[str, Any]) -> dict[str, str]:
    """What verify.compare measured, as a person reads it."""
    rows = {}
    for name, label in LABELS.items():
        if name not in fidelity:
            continue
        value = fidelity[name]
        if isinstance(value, int):
            rows[label] = f"{value:,}"
        elif name in ("top1_agreement", "experts_kept"):
            rows[label] = f"{value:.2%}"
        else:
            rows[label] = f"{value:.2e}" if "kl" in name else f"{value:.4f}"
    return rows


def write_card(
    output: Path, trained: RunWeights, *, form: str, name: str, record: dict[str, Any]
) -> None:
    """README.md. record: what export.json will hold."""
    identity = trained.record.to_json()
    base = hub_name(identity["model"])
    sections = [
        front_matter(trained, form=form),
        f"# {name}\n\n{WHAT[form]}: {base} fine-tuned on {hub_name(identity['dataset'])}. "
        f"From `{trained.origin}`, step {trained.step}.",
        "```python\n" + LOADING[form].format(base=base, name=name) + "\n```",
        "## Training\n\n" + table(training(trained)),
        evaluation(trained.folder, output),
        fidelity_section(record),
        "## Licence\n\nApache 2.0, as that of gpt-oss.",
    ]
    (output / "README.md").write_text("\n\n".join(filter(None, sections)) + "\n")


def front_matter(trained: RunWeights, *, form: str) -> str:
    """What the hub reads. A folder of this machine is no name there, and stays out of it."""
    identity = trained.record.to_json()
    fields: dict[str, Any] = {
        "license": "apache-2.0",
        "library_name": "peft" if form == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt-oss", "harmony", "sft", "trl", *(["lora"] if trained.is_adapter else [])],
    }
    if is_on_hub(identity["model"]):
        fields["base_model"] = identity["model"]
        fields["base_model_relation"] = "adapter" if form == "adapter" else "finetune"
    datasets = [re.split(r"[:@*]", source)[0] for source in identity["dataset"].split(",")]
    if all(map(is_on_hub, datasets)):
        fields["datasets"] = datasets
    return "---\n" + yaml.safe_dump(fields, sort_keys=False) + "---"


def training(trained: RunWeights) -> dict[str, Any]:
    identity = trained.record.to_json()
    shown = {name: value for name, value in identity.items() if name not in NOT_SHOWN}
    revision = identity["model_revision"]
    return {"base model": hub_name(identity["model"]), "its revision": revision} | {
        name.replace("_", " "): value for name, value in shown.items() if value not in (None, "")
    }


def evaluation(source: Path, output: Path) -> str:
    """What evaluate.py has measured, base -> trained, and the run's plot, copied beside the card.

    Figures alone: the conversations are the user's, and a card is read by others.
    """
    parts = []
    if (source / EVALUATION).is_file():
        measured = json.loads((source / EVALUATION).read_text())
        columns = ("tokens", "loss", "perplexity", "token_accuracy")
        lines = ["| | " + " | ".join(columns).replace("_", " ") + " |", "|---" * 5 + "|"]
        for channel, figures in measured["loss"].items():
            values = " | ".join(as_text(rounded(figures[name])) for name in columns)
            lines.append(f"| {channel} | {values} |")
        parts.append("\n".join(lines))
        shares = {
            name.replace("_", " "): as_text(rounded(pair))
            for name, pair in measured.items()
            if isinstance(pair, list) and name != "generations"
        }
        parts.append(f"Of {measured['generated']} answers, base -> trained:\n\n{table(shares)}")
    if (source / LOSS_PLOT).is_file():
        shutil.copyfile(source / LOSS_PLOT, output / LOSS_PLOT)
        parts.append(f"![training and evaluation loss]({LOSS_PLOT})")
    return "\n\n".join(["## Evaluation", *parts]) if parts else ""


def rounded(value: Any) -> Any:
    """Floats, also those of a pair, to four digits."""
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def fidelity_section(record: dict[str, Any]) -> str:
    if "fidelity" not in record:
        return "## Fidelity\n\nNot compared with the trained model (`--verify false`)."
    text = f"Loaded from disk and compared with the trained model on {record['text']}.\n\n"
    text += table(fidelity_rows(record["fidelity"]))
    return "## Fidelity\n\n" + text + "".join(f"\n\n{hint}" for hint in record.get("hints", []))


def table(rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def is_on_hub(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def hub_name(name: str) -> str:
    """A path's last part; of its folders a card says nothing."""
    return name if is_on_hub(name) else ", ".join(Path(part).name for part in name.split(","))


def default_name(run_dir: Path) -> str:
    """The run's folder's name, also where its artifact alone is given."""
    run_dir = run_dir.resolve()
    return run_dir.parent.name if run_dir.name == ARTIFACT else run_dir.name
