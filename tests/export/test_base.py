"""Only the base that was trained is merged with."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.export.base import open_base
from finetune.export.source import find_run_weights


def test_a_base_that_has_moved_is_recognised(
    run_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(tiny_model, tmp_path / "moved")
    record = find_run_weights(run_dir).record
    assert open_base(record).folder == tiny_model
    assert open_base(record, moved_to=str(moved)).folder == moved


def test_a_base_with_other_weights_is_refused(
    run_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="is not the model that was trained"):
        open_base(find_run_weights(run_dir).record, moved_to=str(other))


def test_a_base_that_is_gone_is_named(run_dir: Path) -> None:
    record = replace(find_run_weights(run_dir).record, model="/gone/gpt-oss")
    with pytest.raises(UserError, match="/gone/gpt-oss is not there: say where it is with --model"):
        open_base(record)
