"""LoRA merged as PEFT merges it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import UserError
from helpers.finished_runs import open_run, peft_model, save_adapter_run


@pytest.mark.parametrize("flags", [{}, {"use_rslora": True}, {"lora_modules_to_save": ["lm_head"]}])
def test_weights_are_merged_as_peft_merges_them(
    flags: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    save_adapter_run(tmp_path, tiny_model, **flags)
    merged = open_run(tmp_path)
    expected = peft_model(tiny_model, tmp_path).merge_and_unload().state_dict()
    assert set(merged.names) == expected.keys()
    base = merged.base
    for name in merged.names:
        actual = merged.dense(name)
        # Sums in another order can round to the neighbour.
        torch.testing.assert_close(actual, expected[name].bfloat16(), rtol=2**-7, atol=1e-6)
        assert (actual != expected[name].bfloat16()).float().mean() < 1e-3
        is_changed = not actual.equal(base.dense(name))
        adapted = name in merged.targets or name in merged.replaced
        assert is_changed == adapted, name
    assert len(merged.targets) == 2 * 6  # of a layer: q, k, v, o, both stacks


def test_any_rows_of_a_weight_can_be_asked_for(run_dir: Path) -> None:
    merged = open_run(run_dir)
    merged.chunk_bytes = 1  # row by row
    for name in merged.names:
        weight = merged.rows(name)
        assert weight.shape == merged.shape(name)
        assert merged.dense(name).equal(weight)
        assert merged.dense(name, start=1, stop=3).equal(weight[1:3])
        assert merged.rows(name, start=2).equal(weight[2:])


def test_an_adapter_for_other_modules_is_refused(run_dir: Path) -> None:
    file = run_dir / "final/adapter_config.json"
    file.write_text(file.read_text().replace('"mlp.experts.down_proj",', ""))
    with pytest.raises(UserError, match="does not fit"):
        open_run(run_dir)
