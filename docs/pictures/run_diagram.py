"""Draw a run from its data to the served model: python docs/pictures/run_diagram.py run.svg"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

LAPTOP, NODE, BUCKET = "#e8f0fe", "#e6f4ea", "#fef3e0"
WIDTH, HEIGHT = 2.0, 1.15
INK, QUIET = "#1f2933", "#52606d"
Point = tuple[float, float]


def box(axes: Axes, center: Point, title: str, text: str, *, color: str) -> None:
    """A rounded box with a bold title and up to two lines under it."""
    x, y = center
    axes.add_patch(
        FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=color,
            edgecolor=INK,
            linewidth=1.0,
        )
    )
    axes.text(x, y + 0.27, title, ha="center", va="center", fontsize=11, weight="bold", color=INK)
    axes.text(x, y - 0.18, text, ha="center", va="center", fontsize=8.5, color=QUIET)


def arrow(axes: Axes, start: Point, end: Point, *, bend: float = 0.0, dashed: bool = False) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=14,
            color=INK,
            linewidth=1.3,
            linestyle="--" if dashed else "-",
            connectionstyle=f"arc3,rad={bend}",
        )
    )


def note(axes: Axes, at: Point, text: str) -> None:
    axes.text(*at, text, ha="center", va="center", fontsize=8.5, color=QUIET, style="italic")


def draw(axes: Axes) -> None:
    top, bottom = 3.1, 0.95
    data, train, bucket, export = ((x, top) for x in (1.1, 4.0, 6.9, 9.8))
    preview, rehearse, evaluate, serve = ((x, bottom) for x in (1.1, 4.0, 6.9, 9.8))
    box(axes, data, "your data", "JSONL, Parquet, CSV,\nURL or hub name", color=LAPTOP)
    box(axes, train, "train.py", "1 to 32 GPUs;\nLoRA or all weights", color=NODE)
    box(axes, bucket, "S3 bucket", "checkpoint-N and,\nat the end, final", color=BUCKET)
    box(axes, export, "export.py", "adapter, bf16\nor MXFP4", color=NODE)
    box(axes, preview, "preview.py", "tokens and loss\nof every row", color=LAPTOP)
    box(axes, rehearse, "make rehearse", "the same task file,\na tiny model, no GPU", color=LAPTOP)
    box(axes, evaluate, "evaluate.py", "base and trained model\non held-out rows", color=NODE)
    box(axes, serve, "serve.yaml", "vLLM on one GPU,\nOpenAI's API", color=NODE)

    half, gap = WIDTH / 2, 0.06
    for left, right in ((data, train), (bucket, export)):
        arrow(axes, (left[0] + half + gap, top), (right[0] - half - gap, top))
    edge, far = train[0] + half + gap, bucket[0] - half - gap
    arrow(axes, (edge, top + 0.25), (far, top + 0.25))
    arrow(axes, (far, top - 0.25), (edge, top - 0.25), dashed=True)
    note(axes, ((edge + far) / 2, top + 0.5), "save")
    note(axes, ((edge + far) / 2, top - 0.52), "resume")
    for above, below in ((data, preview), (bucket, evaluate), (export, serve)):
        arrow(axes, (above[0], top - HEIGHT / 2 - gap), (below[0], bottom + HEIGHT / 2 + gap))
    arrow(
        axes,
        (train[0], bottom + HEIGHT / 2 + gap),
        (train[0], top - HEIGHT / 2 - gap),
        dashed=True,
    )
    note(axes, (train[0] + 0.42, (top + bottom) / 2), "first")
    # An adapter is served as it is, beside its published base.
    start, end = (bucket[0] + half, top - 0.45), (serve[0] - half, bottom + 0.45)
    arrow(axes, start, end)
    note(axes, (bucket[0] + half + 0.68, (top + bottom) / 2 + 0.28), "adapter")

    legend = (("your machine", LAPTOP), ("rented GPU node", NODE), ("object storage", BUCKET))
    for number, (label, color) in enumerate(legend):
        x = 2.6 + 2.3 * number
        axes.add_patch(
            FancyBboxPatch(
                (x, -0.18),
                0.26,
                0.2,
                boxstyle="round,pad=0,rounding_size=0.04",
                facecolor=color,
                edgecolor=INK,
                linewidth=0.8,
            )
        )
        axes.text(x + 0.38, -0.08, label, ha="left", va="center", fontsize=9, color=QUIET)


def main(file: Path) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "run"  # the same bytes each time it is drawn
    figure, axes = pyplot.subplots(figsize=(10.9, 4.1), layout="constrained")
    figure.set_facecolor("white")
    axes.set(xlim=(0, 10.9), ylim=(-0.3, 3.8))
    axes.set_aspect("equal")
    axes.axis("off")
    draw(axes)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
