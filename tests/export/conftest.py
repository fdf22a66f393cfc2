"""A run to export, made without training."""

from pathlib import Path

import pytest

from helpers.finished_runs import save_adapter_run


@pytest.fixture
def run_dir(tiny_model: Path, tmp_path: Path) -> Path:
    """The folder of a finished LoRA run whose adapter holds random numbers."""
    save_adapter_run(tmp_path / "run", tiny_model)
    return tmp_path / "run"
