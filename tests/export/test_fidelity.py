"""An export that lost what was trained is found out, by its weights and by its predictions."""

from pathlib import Path

import pytest
import torch

from finetune.errors import UserError
from finetune.export.divergence import Rows
from finetune.export.fidelity import (
    check_effect,
    compare_predictions,
    experts_kept,
    fidelity_hints,
)
from finetune.export.files import write_config
from finetune.export.merge import MergedWeights
from finetune.export.record import Format
from finetune.export.shards import write_weights
from helpers.finished_runs import open_run, save_adapter_run


class WithoutExperts(MergedWeights):
    """Linear layers merged and experts left as they are: what a tool does that knows no stacks."""

    def delta(self, name: str, *, start: int = 0, stop: int | None = None) -> torch.Tensor | None:
        return None if self.is_experts(name) else super().delta(name, start=start, stop=stop)


def forget_experts(merged: MergedWeights) -> MergedWeights:
    return WithoutExperts(merged.base, merged.run_weights, merged.targets)


def some_rows() -> Rows:
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": ids, "labels": [-100] * 20 + ids[20:]}]


@pytest.mark.parametrize("form", ["bf16", "mxfp4"])
def test_experts_that_were_not_merged_are_noticed_in_the_weights(
    form: Format, run_dir: Path, tmp_path: Path
) -> None:
    merged = open_run(run_dir)
    write_weights(forget_experts(merged), tmp_path, form=form)
    with pytest.raises(UserError, match="mlp.experts.* has vanished in the export: 0.0%"):
        experts_kept(tmp_path, merged, form=form)


def test_experts_that_were_not_merged_are_noticed_in_the_predictions(
    run_dir: Path, tmp_path: Path
) -> None:
    merged = open_run(run_dir)
    write_config(merged.base, tmp_path, form="bf16")
    write_weights(forget_experts(merged), tmp_path, form="bf16")
    result = compare_predictions(tmp_path, merged, some_rows(), form="bf16")
    with pytest.raises(UserError, match="has lost what was trained: its KL divergence"):
        check_effect(result, form="bf16")


def test_changes_too_small_for_mxfp4_are_noticed(tiny_model: Path, tmp_path: Path) -> None:
    """They are lost by rounding and not by a mistake: bf16 keeps some of them."""
    save_adapter_run(tmp_path / "run", tiny_model, std=2e-4)
    merged = open_run(tmp_path / "run")
    for form in ("bf16", "mxfp4"):
        (tmp_path / form).mkdir()
        write_weights(merged, tmp_path / form, form=form)
    assert experts_kept(tmp_path / "bf16", merged, form="bf16")
    with pytest.raises(UserError, match="vanished.* take --format adapter"):
        experts_kept(tmp_path / "mxfp4", merged, form="mxfp4")


def test_an_adapter_without_effect_on_experts_is_not_measured(
    tiny_model: Path, tmp_path: Path
) -> None:
    save_adapter_run(tmp_path / "run", tiny_model, std=0.0)
    merged = open_run(tmp_path / "run")
    write_weights(merged, tmp_path, form="bf16")
    assert experts_kept(tmp_path, merged, form="bf16") is None


def test_a_costly_requantisation_is_a_hint() -> None:
    fidelity = {"kl": 0.03, "kl_bf16": 0.01, "loss": 2.5, "loss_bf16": 2.25, "effect_kl": 0.1}
    cost, advice = fidelity_hints(fidelity, form="mxfp4", is_adapter=True)
    assert "2.00e-02 nats a token of KL and +0.2500 of loss" in cost
    assert "--format adapter" in advice
    assert len(fidelity_hints(fidelity | {"effect_kl": 1.0}, form="mxfp4", is_adapter=True)) == 1
    assert fidelity_hints(fidelity, form="bf16", is_adapter=True) == []
