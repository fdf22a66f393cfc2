"""The picture of a run's losses: both curves, named, over the launches of the whole run."""

from pathlib import Path

import numpy as np
import pytest

from finetune.plot import draw_losses, plot_losses

HISTORY = [
    {"step": 0, "eval_loss": 3.0},
    {"step": 1, "loss": 2.9},
    {"step": 2, "loss": 2.5},
    {"step": 2, "eval_loss": 2.6},
    {"step": 2, "train_runtime": 1.0},
]


def test_training_and_evaluation_are_two_named_curves() -> None:
    (axes,) = draw_losses(HISTORY, title="my run").axes
    training, evaluation = axes.lines
    assert np.asarray(training.get_xydata()).tolist() == [[1, 2.9], [2, 2.5]]
    assert np.asarray(evaluation.get_xydata()).tolist() == [[0, 3.0], [2, 2.6]]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.texts] == ["training", "evaluation"]
    labels = (axes.get_xlabel(), axes.get_ylabel(), axes.get_title())
    assert labels == ("step", "loss", "my run")


def test_without_an_evaluation_there_is_one_curve() -> None:
    assert len(draw_losses(HISTORY[1:3], title=None).axes[0].lines) == 1


def test_the_picture_is_a_png_in_a_folder_that_is_made(tmp_path: Path) -> None:
    plot_losses(HISTORY, tmp_path / "final/loss.png", title="my run")
    assert (tmp_path / "final/loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("title", ["a$^$b", "$\\frac$", "x[/y]", "two\nlines", None])
def test_any_title_is_plain_text(title: str | None, tmp_path: Path) -> None:
    plot_losses(HISTORY, tmp_path / "loss.png", title=title)
    assert (tmp_path / "loss.png").stat().st_size > 0
