"""What is trained and exported computes as OpenAI's own model does: logits and all gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.export.shards import write_weights
from finetune.model.loading import load_model
from finetune.model.weights import BaseWeights
from helpers.finished_runs import open_run, save_adapter_run
from helpers.openai_reference import as_reference, read_mxfp4, reference_model

# Four windows of the tiny model's sliding layers.
NUM_TOKENS = 128


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2048, (NUM_TOKENS,), generator=generator)


def trained_model(folder: Path, *, attention: str = "eager") -> Any:
    """The model as train.py loads it, with its own experts, in fp32."""
    weights = BaseWeights(str(folder))
    return load_model(weights, attn_implementation=attention, dequantize=True).float()


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_logits_and_all_gradients_are_openais(tiny_model: Path) -> None:
    model = trained_model(tiny_model)
    reference = reference_model(model.config, weights_of(model))
    ours, theirs = model(input_ids=tokens()[None]).logits[0], reference(tokens())
    assert (ours - theirs).abs().max() < 1e-5
    # The same random weight for each logit, so that no gradient cancels out.
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    renamed = as_reference(gradients, model.config.num_hidden_layers)
    for name, parameter in reference.named_parameters():
        scale = parameter.grad.abs().max()
        assert scale > 0, name
        assert (renamed[name] - parameter.grad).abs().max() < 1e-5 * scale, name


@pytest.mark.parametrize("changed", ["sliding_window", "swiglu_limit", "sinks", "rope"])
def test_a_difference_in_any_part_is_noticed(changed: str, tiny_model: Path) -> None:
    """The comparison reaches each part: with one of them changed it fails."""
    model = trained_model(tiny_model)
    reference = reference_model(model.config, weights_of(model))
    for block in reference.block:
        if changed == "sliding_window":
            block.attn.sliding_window //= 2
        elif changed == "swiglu_limit":
            block.mlp.swiglu_limit = 1e-3
        elif changed == "sinks":
            block.attn.sinks.data += 1
        else:
            block.attn.rope.scaling_factor = 1.0
    ours, theirs = model(input_ids=tokens()[None]).logits[0], reference(tokens())
    assert (ours - theirs).abs().max() > 1e-5


def test_exported_mxfp4_is_read_by_openais_code(tiny_model: Path, tmp_path: Path) -> None:
    """The experts of a trained adapter, re-quantised and written, are those that we read back."""
    save_adapter_run(tmp_path / "run", tiny_model)
    merged = open_run(tmp_path / "run")
    write_weights(merged, tmp_path, form="mxfp4")
    files = BaseWeights(str(tmp_path))
    weights = {name: files.dense(name).float() for name in merged.names}
    for name in filter(merged.is_experts, merged.names):
        assert read_mxfp4(tmp_path, name).float().equal(weights[name].transpose(1, 2)), name
    model = trained_model(tiny_model)
    reference = reference_model(model.config, weights)
    model.load_state_dict(weights)
    ours, theirs = model(input_ids=tokens()[None]).logits[0], reference(tokens())
    assert (ours - theirs).abs().max() < 1e-5
