"""What a finished run leaves, and when it says so."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from peft import get_peft_model
from trl import ModelConfig

from finetune.checkpoint import bucket
from finetune.checkpoint.artifact import SUMMARY, is_finished, save_artifact
from finetune.model.loading import load_model, load_tokenizer
from finetune.model.lora import lora_config
from finetune.model.weights import BaseWeights

WEIGHTS = "adapter_model.safetensors"


def adapted(tiny_model: Path) -> Any:
    weights = BaseWeights(str(tiny_model))
    model = load_model(weights, attn_implementation="eager", dequantize=False)
    args = ModelConfig(use_peft=True, lora_r=2, lora_dropout=0.0)
    return get_peft_model(model, lora_config(model, args))


def test_it_is_finished_when_the_bucket_has_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rclone uploads in no order: a summary that came first would stand for lost weights."""
    artifact, records = tmp_path / "final", tmp_path / "vfsMeta"
    records.mkdir()
    (records / WEIGHTS).write_text('{"Dirty": true}')
    monkeypatch.setattr(bucket, "cache_of", lambda folder: records)
    looked = []

    def is_uploaded(record: Path) -> bool:
        uploaded = not record.exists() or not json.loads(record.read_text())["Dirty"]
        if record.name == WEIGHTS and not uploaded:
            looked.append((artifact / SUMMARY).exists())
            if len(looked) == 3:
                record.write_text('{"Dirty": false}')
        return uploaded

    monkeypatch.setattr(bucket, "is_uploaded", is_uploaded)
    with ThreadPoolExecutor() as executor:
        executor.submit(
            save_artifact,
            Accelerator(cpu=True),
            adapted(tiny_model),
            load_tokenizer(str(tiny_model)),
            artifact=artifact,
            summary={"steps": 4},
        ).result()
    assert looked == [False] * 3
    assert is_finished(artifact)
    assert json.loads((artifact / SUMMARY).read_text())["files"][WEIGHTS] > 0


@pytest.mark.parametrize("lost", [WEIGHTS, SUMMARY])
def test_it_is_not_finished_without_its_weights(lost: str, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    (tmp_path / SUMMARY).write_text(json.dumps({"files": {WEIGHTS: 7}}))
    assert is_finished(tmp_path)
    (tmp_path / lost).write_bytes((tmp_path / lost).read_bytes()[:-1])
    assert not is_finished(tmp_path)
