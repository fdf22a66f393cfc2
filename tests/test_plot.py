"""The picture of a run's losses: both curves, named, whatever launches they are of."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

from finetune.plot import plot_losses

HISTORY = [
    {"step": 0, "eval_loss": 3.0},
    {"step": 1, "loss": 2.9},
    {"step": 2, "loss": 2.5},
    {"step": 2, "eval_loss": 2.6},
    {"step": 2, "train_runtime": 1.0},
]


def test_both_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plot.pyplot.close", lambda figure: None)
    plot_losses(HISTORY, tmp_path / "final/loss.png", title="my run")
    (axes,) = pyplot.gcf().axes
    training, evaluation = axes.lines
    assert np.asarray(training.get_xydata()).tolist() == [[1, 2.9], [2, 2.5]]
    assert np.asarray(evaluation.get_xydata()).tolist() == [[0, 3.0], [2, 2.6]]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.texts] == ["training", "evaluation"]
    labels = (axes.get_xlabel(), axes.get_ylabel(), axes.get_title())
    assert labels == ("step", "loss", "my run")
    assert (tmp_path / "final/loss.png").read_bytes()[:4] == b"\x89PNG"


def test_without_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plot.pyplot.close", lambda figure: None)
    plot_losses(HISTORY[1:3], tmp_path / "loss.png", title=None)
    assert len(pyplot.gcf().axes[0].lines) == 1
