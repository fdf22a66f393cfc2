"""The loss curve of a run, as a picture beside its artifact."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a node has no display

from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def plot_losses(log_history: list[dict[str, Any]], file: Path, *, title: str | None) -> None:
    """Write draw_losses' figure to file, a .png whose folder is made if it is missing."""
    figure = draw_losses(log_history, title=title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def draw_losses(log_history: list[dict[str, Any]], *, title: str | None) -> Figure:
    """Training and evaluation loss over optimizer steps.

    log_history: TrainerState's, of every launch of the run.
    """
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    many = len(curve(log_history, "loss")[0]) > 200
    axes.plot(
        *curve(log_history, "loss"),
        color="tab:blue",
        linewidth=0.8 if many else 1.5,
        alpha=0.7 if many else 1.0,
        label="training",
    )
    steps, losses = curve(log_history, "eval_loss")
    if steps:
        axes.plot(steps, losses, color="tab:orange", marker="o", markersize=5, label="evaluation")
    axes.set(xlabel="step", ylabel="loss")
    axes.set_title(title or "", parse_math=False)  # a name with two $ is no formula
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    return figure


def curve(log_history: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; of a step logged twice the later value."""
    points = {entry["step"]: entry[name] for entry in log_history if name in entry}
    return sorted(points), [points[step] for step in sorted(points)]
