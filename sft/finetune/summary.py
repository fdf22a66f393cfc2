"""The table a person reads at the end of a run."""

import math
import unicodedata
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def evaluations(log_history: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Loss, perplexity and token accuracy (0 to 1) of the held-out share, each [before, after].

    log_history: TrainerState's, which spans all launches of the run. before is None if none of them
    evaluated at step 0. Empty if none ever evaluated.
    """
    entries = [entry for entry in log_history if "eval_loss" in entry]
    if not entries:
        return {}
    first, last = entries[0] if entries[0]["step"] == 0 else {}, entries[-1]
    losses = [entry.get("eval_loss") for entry in (first, last)]
    accuracies = [entry.get("eval_mean_token_accuracy") for entry in (first, last)]
    named = {
        "eval_loss": losses,
        "eval_perplexity": [None if loss is None else perplexity(loss) for loss in losses],
        "eval_token_accuracy": accuracies,
    }
    return {
        name: [None if value is None else round(value, 4) for value in values]
        for name, values in named.items()
    }


def perplexity(loss: float) -> float:
    """exp(loss), or infinity where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def printable(text: str) -> str:
    """A text with its control characters written out, so that data cannot steer a terminal."""
    return "".join(
        char
        if char in "\n\t"
        or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        or char == "\u200d"  # joins emoji
        else char.encode("unicode_escape").decode()
        for char in text
    )


def print_summary(summary: dict[str, Any], *, title: str) -> None:
    """Print the table a person reads at the end of a run."""
    # Text, because rich would read a plain string such as "x[/y]" as markup.
    table = Table(title=Text(printable(title)), show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in summary.items():
        table.add_row(Text(name.replace("_", " ")), Text(printable(as_text(value))))
    Console(width=100).print(table)


def as_text(value: Any) -> str:
    """A value for the table: [before, after] with an arrow, integers with commas."""
    if isinstance(value, list):
        return " -> ".join("not evaluated" if part is None else str(part) for part in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
