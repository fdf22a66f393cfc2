"""The artifact of a finished run, and when it counts as complete."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from peft import get_peft_model
from trl import ModelConfig

from finetune.checkpoint.artifact import EVALUATION, SUMMARY, is_finished, save_artifact
from finetune.checkpoint.bucket import Cache, await_upload
from finetune.checkpoint.summary_file import write_summary
from finetune.model.loading import load_model, load_tokenizer
from finetune.model.lora import lora_config
from finetune.model.weights import BaseWeights
from helpers.checkpoints import flip_a_bit

WEIGHTS = "adapter_model.safetensors"


def adapted(tiny_model: Path) -> Any:
    weights = BaseWeights(str(tiny_model))
    model = load_model(weights, attn_implementation="eager", dequantize=False)
    args = ModelConfig(use_peft=True, lora_r=2, lora_dropout=0.0)
    return get_peft_model(model, lora_config(model, args))


def test_the_summary_is_written_after_the_weights_have_been_uploaded(
    tiny_model: Path, tmp_path: Path
) -> None:
    """rclone uploads files in any order: a summary that was there first would outlive the weights
    if the node was lost.
    """
    artifact, records = tmp_path / "final", tmp_path / "vfsMeta"
    records.mkdir()
    (records / WEIGHTS).write_text('{"Dirty": true}')
    summary_was_there = []
    artifact.mkdir()
    (artifact / EVALUATION).write_text("{}")  # of this run's result, before it was damaged

    def poll(seconds: float) -> None:
        """rclone uploads the weights while await_upload sleeps for the third time."""
        summary_was_there.append((artifact / SUMMARY).exists())
        if len(summary_was_there) == 3:
            (records / WEIGHTS).write_text('{"Dirty": false}')

    save_artifact(
        Accelerator(cpu=True),
        adapted(tiny_model),
        load_tokenizer(str(tiny_model)),
        artifact=artifact,
        summary={"steps": 4},
        await_upload=partial(await_upload, find_cache=lambda folder: Cache(records), sleep=poll),
    )
    assert summary_was_there == [False] * 3
    assert is_finished(artifact)
    assert json.loads((artifact / SUMMARY).read_text())["files"][WEIGHTS] > 0
    (artifact / EVALUATION).write_text('{"loss": {}}')
    assert is_finished(artifact)


@pytest.mark.parametrize("lost", [WEIGHTS, SUMMARY])
def test_an_artifact_with_a_file_cut_off_is_not_finished(lost: str, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    (tmp_path / SUMMARY).write_text(json.dumps({"files": {WEIGHTS: 7}}))
    assert is_finished(tmp_path)
    (tmp_path / lost).write_bytes((tmp_path / lost).read_bytes()[:-1])
    assert not is_finished(tmp_path)


@pytest.mark.parametrize("damaged", [WEIGHTS, SUMMARY])
def test_an_artifact_with_a_flipped_bit_is_not_finished_and_the_file_is_named(
    damaged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / WEIGHTS, tmp_path / "tokenizer.json"]
    for file in files:
        file.write_bytes(bytes(1000))
    write_summary(tmp_path, {"steps": 4}, files)
    assert is_finished(tmp_path)
    flip_a_bit(tmp_path / damaged)
    assert not is_finished(tmp_path)
    assert f"the result is damaged, and written again: {tmp_path / damaged}" in (
        capsys.readouterr().out
    )
