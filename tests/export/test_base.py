"""Only the base that was trained is merged with."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from finetune.errors import UserError
from finetune.export.base import open_base
from finetune.export.source import find_run_weights
from helpers.finished_runs import with_other_weights
from helpers.hub import COMMIT, put_in_cache


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
    other = with_other_weights(tiny_model, tmp_path)
    with pytest.raises(UserError, match="is not the model that was trained"):
        open_base(find_run_weights(run_dir).record, moved_to=str(other))


def test_a_folder_of_the_hubs_cache_is_known_by_its_commit(
    run_dir: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = put_in_cache(tiny_model, tmp_path / "cache", "ada/tiny")
    trained = find_run_weights(run_dir).record
    record = replace(trained, model="ada/tiny", model_revision=COMMIT)
    assert open_base(record, moved_to=str(folder)).folder == folder
    assert open_base(trained, moved_to=str(folder)).folder == folder  # a copy of what was trained
    with pytest.raises(UserError, match=f"its revision is {COMMIT}, not d+; give --model that one"):
        open_base(replace(record, model_revision="d" * 40), moved_to=str(folder))


def test_a_hubs_model_is_compared_with_the_folder_that_was_trained(
    run_dir: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    record = find_run_weights(run_dir).record
    same = put_in_cache(tiny_model, tmp_path / "cache", "ada/tiny")
    assert open_base(record, moved_to="ada/tiny").folder == same
    put_in_cache(with_other_weights(tiny_model, tmp_path), tmp_path / "cache", "ada/other")
    with pytest.raises(UserError, match="ada/other is not the model that was trained"):
        open_base(record, moved_to="ada/other")


def test_a_base_that_is_gone_is_named(run_dir: Path) -> None:
    record = replace(find_run_weights(run_dir).record, model="/gone/gpt-oss")
    with pytest.raises(UserError, match="/gone/gpt-oss is not there: say where it is with --model"):
        open_base(record)
