"""The model card of an export: what it is, how to load it, how it was trained and evaluated, how
faithful it is.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from finetune.checkpoint.artifact import ARTIFACT, EVALUATION, LOSS_PLOT
from finetune.checkpoint.fingerprint import RunRecord
from finetune.errors import only_warn
from finetune.export.record import ExportRecord
from finetune.export.source import RunWeights
from finetune.summary import as_text

LOADING = {
    "adapter": """```python
base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "{name}")
```""",
    "bf16": """```python
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
```""",
    "mxfp4": """```python
model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
```""",
    "gguf": """```bash
llama-server -m model.gguf --jinja
```""",
    "gguf-adapter": """With `base.gguf`, a GGUF file of {base} whose experts are in MXFP4:

```bash
llama-server -m base.gguf --lora adapter.gguf --jinja
```""",
}
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
# How each figure of fidelity.measure_fidelity is called, in the order of the table.
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
    "experts_effect_kl": "for comparison: KL without LoRA on the experts",
    "experts_kept": "share of the experts' change that the weights hold",
}
# Of the run's record: what the card names elsewhere.
NOT_SHOWN = {"model", "model_revision", "dataset", "dataset_sha256"}


def fidelity_rows(fidelity: dict[str, Any]) -> dict[str, str]:
    """The figures of measure_fidelity under the labels, and in the format, that a person reads."""
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


def write_card(output: Path, run_weights: RunWeights, record: ExportRecord, *, name: str) -> None:
    """Write README.md, the card that the hub shows. name: of the exported model."""
    run = run_weights.record
    base = hub_name(run.model)
    sections = [
        front_matter(run, record),
        f"# {name}\n\n{DESCRIPTIONS[record.format]}: {base} fine-tuned on "
        f"{hub_name(run.dataset)}. From `{record.origin}`, step {record.step}.",
        LOADING[record.format].format(base=base, name=name),
        "## Training\n\n" + table(training_rows(run)),
        evaluation(run_weights.folder, output),
        fidelity_section(record),
        "## Licence\n\nApache 2.0, as that of gpt-oss.",
    ]
    (output / "README.md").write_text("\n\n".join(filter(None, sections)) + "\n")


def front_matter(run: RunRecord, record: ExportRecord) -> str:
    """The YAML that the hub reads. It names models and datasets of the hub, never local folders."""
    fields: dict[str, Any] = {
        "license": "apache-2.0",
        "library_name": LIBRARIES.get(record.format, "transformers"),
        "pipeline_tag": "text-generation",
        "tags": ["gpt-oss", "harmony", "sft", "trl", *(["lora"] if run.use_peft else [])],
    }
    if is_on_hub(run.model):
        fields["base_model"] = run.model
        is_adapter = record.format in ("adapter", "gguf-adapter")
        fields["base_model_relation"] = "adapter" if is_adapter else "finetune"
    # A dataset may be followed by its split, revision or number of repetitions.
    datasets = [re.split(r"[:@*]", source)[0] for source in run.dataset.split(",")]
    if all(map(is_on_hub, datasets)):
        fields["datasets"] = datasets
    return "---\n" + yaml.safe_dump(fields, sort_keys=False) + "---"


def training_rows(run: RunRecord) -> dict[str, Any]:
    """What the run was trained with, by the labels of the card's table."""
    rows = {"base model": hub_name(run.model), "its revision": run.model_revision}
    for name, value in run.to_json().items():
        if name not in NOT_SHOWN and value not in (None, ""):
            rows[name.replace("_", " ")] = value
    return rows


def evaluation(source: Path, output: Path) -> str:
    """The section with evaluate.py's figures, base -> trained, and the plot of the run's loss.

    source: the run's folder that is exported; the plot is copied to output. The section has figures
    only: the generated texts answer the user's own data, and others read the card. "" if the run
    has neither figures nor plot.
    """
    parts = []
    if (source / EVALUATION).is_file():
        with only_warn(f"the card has no figures, for {source / EVALUATION} is damaged"):
            parts += evaluation_tables(json.loads((source / EVALUATION).read_text()))
    if (source / LOSS_PLOT).is_file():
        shutil.copyfile(source / LOSS_PLOT, output / LOSS_PLOT)
        parts.append(f"![training and evaluation loss]({LOSS_PLOT})")
    return "\n\n".join(["## Evaluation", *parts]) if parts else ""


def evaluation_tables(measured: dict[str, Any]) -> list[str]:
    """The figures of evaluation.json: losses by channel, and shares of the generated answers."""
    columns = ("tokens", "loss", "perplexity", "token_accuracy")
    lines = ["| | " + " | ".join(columns).replace("_", " ") + " |", "|---" * 5 + "|"]
    for channel, figures in measured["loss"].items():
        values = " | ".join(as_text(rounded(figures[name])) for name in columns)
        lines.append(f"| {channel} | {values} |")
    shares = {
        name.replace("_", " "): as_text(rounded(pair))
        for name, pair in measured.items()
        if isinstance(pair, list) and name != "generations"
    }
    answers = f"Of {measured['generated']} answers, base -> trained:\n\n{table(shares)}"
    return ["\n".join(lines), answers]


def rounded(value: Any) -> Any:
    """Floats, also those of a pair, to four digits."""
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 4) if isinstance(value, float) else value


def fidelity_section(record: ExportRecord) -> str:
    if record.fidelity is None:
        return "## Fidelity\n\nNot compared with the trained model (`--verify false`)."
    text = f"Loaded from disk and compared with the trained model on {record.text}."
    parts = ["## Fidelity", text, table(fidelity_rows(record.fidelity)), *record.hints]
    return "\n\n".join(parts)


def table(rows: dict[str, Any]) -> str:
    """A Markdown table of two columns without headings."""
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def is_on_hub(name: str) -> bool:
    """Whether this is a hub's OWNER/NAME, and no path of this machine."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def hub_name(name: str) -> str:
    """A hub's name as it is; of paths only the last part, as folders are nobody else's business."""
    return name if is_on_hub(name) else ", ".join(Path(part).name for part in name.split(","))


def default_name(run_dir: Path) -> str:
    """The name of the run's folder, also if the folder of its artifact is given."""
    run_dir = run_dir.resolve()
    return run_dir.parent.name if run_dir.name == ARTIFACT else run_dir.name
