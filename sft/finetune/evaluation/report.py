"""Shows an evaluation: as tables with turns side by side, and in the run's own W&B run."""

import os
from pathlib import Path
from typing import Any

import wandb
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune.checkpoint.history import first_wandb_run
from finetune.summary import printable

SHARES = {
    "valid_harmony": "turns that are valid harmony",
    "cut_short": "turns cut at --max_new_tokens",
    "analysis_in_language": "analyses in the language asked for",
}


def print_report(evaluation: dict[str, Any], *, title: str) -> None:
    """Print the figures, then the turns that were generated before and after training."""
    console = Console(width=100)
    table = Table("", "tokens", "loss", "perplexity", "token accuracy", title=Text(title))
    for name, row in evaluation["loss"].items():
        table.add_row(
            Text(name),
            f"{row['tokens']:,}",
            arrow(row["loss"], ".4f"),
            arrow(row["perplexity"], ".4g"),
            arrow(row["token_accuracy"], ".1%"),
        )
    console.print(table)
    if not evaluation["generations"]:
        return
    table = Table(show_header=False, title=f"of {evaluation['generated']} generated turns")
    for name, label in SHARES.items():
        table.add_row(label, arrow(evaluation[name], ".0%"))
    console.print(table)
    table = Table("asked", "before", "after", show_lines=True)
    for row in evaluation["generations"]:
        table.add_row(
            Text(printable(short(row["question"]))),
            *(turn_text(row[when]) for when in ("before", "after")),
        )
    console.print(table)


def arrow(values: list[float | None], form: str) -> str:
    """[before, after] as "before -> after". form: as in format()."""
    return " -> ".join("none" if value is None else format(value, form) for value in values)


def short(text: str, *, limit: int = 400) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


def turn_text(turn: dict[str, Any]) -> Text:
    """A generated turn, and under it, in red, why it is not valid harmony."""
    text = Text(printable(short(turn["text"])))
    return (
        text.append(f"\n({printable(turn['problem'])})", style="red") if turn["problem"] else text
    )


def send_to_wandb(evaluation: dict[str, Any], *, run_dir: Path) -> None:
    """Add the evaluation to the run's own W&B run: figures to its summary, turns as a table.

    Prints a line instead if no launch has recorded which W&B run that is.
    """
    run_id = first_wandb_run(run_dir)
    if run_id is None:
        print(f"W&B: no launch of {run_dir} has left the id of its W&B run: not sent")
        return
    project = os.environ.get("WANDB_PROJECT")
    with wandb.init(id=run_id, project=project, resume="allow") as run:
        for name, row in evaluation["loss"].items():
            for figure in ("loss", "perplexity", "token_accuracy"):
                for when, value in zip(("before", "after"), row[figure], strict=True):
                    run.summary[f"evaluation/{name}/{figure}/{when}"] = value
        for name in SHARES:
            for when, value in zip(("before", "after"), evaluation[name], strict=True):
                run.summary[f"evaluation/{name}/{when}"] = value
        turns = wandb.Table(["question", "before", "after"])
        for row in evaluation["generations"]:
            turns.add_data(row["question"], row["before"]["text"], row["after"]["text"])
        run.log({"evaluation/generations": turns})
