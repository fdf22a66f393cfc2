"""The tables of a model card: what was trained, how it was evaluated, how faithful an export is."""

import json
import shutil
from pathlib import Path
from typing import Any

from finetune.checkpoint.artifact import EVALUATION, LOSS_PLOT
from finetune.errors import only_warn
from finetune.summary import as_text

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
# What a run's summary.json says of the data and of the evaluation during training.
COUNTS = {
    "samples": "samples trained on",
    "held_out_samples": "samples held out",
    "tokens": "tokens trained on, repetitions counted",
    "steps": "optimizer steps",
}
EVALUATED = {
    "eval_loss": "loss",
    "eval_perplexity": "perplexity",
    "eval_token_accuracy": "token accuracy",
}


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


def count_rows(summary: dict[str, Any]) -> dict[str, str]:
    """How much was trained on. summary: as summary.json has it; runs of 0.1.0 lack some of it."""
    return {label: as_text(summary[name]) for name, label in COUNTS.items() if name in summary}


def evaluation_section(source: Path, output: Path, summary: dict[str, Any]) -> str:
    """The evaluation during training, evaluate.py's figures, base -> trained, and the plot of the
    run's loss.

    source: the run's folder that is described; the plot is copied to output. The section has
    figures only: the generated texts answer the user's own data, and others read the card. "" if
    the run has neither figures nor plot.
    """
    parts = []
    figures = {label: as_text(summary[n]) for n, label in EVALUATED.items() if n in summary}
    if figures:
        parts.append(f"Held-out data, before -> after training:\n\n{table(figures)}")
    if (source / EVALUATION).is_file():
        with only_warn(f"the card has no figures, for {source / EVALUATION} is damaged"):
            parts += evaluation_tables(json.loads((source / EVALUATION).read_text()))
    if (source / LOSS_PLOT).is_file():
        if output != source:
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


def table(rows: dict[str, Any]) -> str:
    """A Markdown table of two columns without headings."""
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
