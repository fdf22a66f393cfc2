"""What an export lost: the artifact, loaded as its users load it, beside the trained model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from transformers import GptOssForCausalLM, Mxfp4Config

from finetune.errors import UserError
from finetune.export.divergence import Logits, Rows, difference, divergence, loss, run
from finetune.export.merge import CPU, MergedWeights, adapted_skeleton
from finetune.export.shards import Format
from finetune.export.source import RunWeights, read_names
from finetune.model.experts import use_grouped_lora
from finetune.model.loading import load_config, load_model, meta_model
from finetune.model.weights import BaseWeights, fill

NOISE_KL = 1e-4  # kernels differ by less; the weights themselves tell of what is smaller
KEPT = 0.01  # of what a stack of experts has learnt; less is nothing


def measure_fidelity(
    output: Path, merged: MergedWeights, rows: Rows, *, form: Format
) -> dict[str, Any]:
    """Load every model in turn, none beside another. Raises UserError if what was trained is gone.

    rows: input_ids and labels. effect_kl: of the base; what training did, to compare with.
    """
    kept = experts_kept(output, merged) if form != "adapter" else None
    references = reference_logits(merged, rows)
    trained = references["trained"]
    exported = run(load_artifact(output, merged.base, form=form), rows)
    result: dict[str, Any] = difference(trained, exported, rows) | {
        "loss_trained": loss(trained, rows),
        "loss_base": loss(references["base"], rows),
        "effect_kl": divergence(trained, references["base"]),
        "experts_kept": kept,
    }
    if "without_experts" in references:
        result["experts_effect_kl"] = divergence(trained, references["without_experts"])
    if form == "mxfp4":
        bf16 = run(in_memory(merged), rows) if merged.trained.is_adapter else trained
        result |= {"kl_bf16": divergence(trained, bf16), "loss_bf16": loss(bf16, rows)}
    check_effect(result, form=form)
    return {name: value for name, value in result.items() if value is not None}


def check_effect(result: dict[str, Any], *, form: Format) -> None:
    """Raise UserError where the artifact is as far from the trained model as without its experts.

    Re-quantisation can cost as much as a short training gave: that is measured, and only hinted at.
    """
    effect = result.get("experts_effect_kl", result["effect_kl"])
    if form != "mxfp4" and effect > NOISE_KL and result["kl"] > effect / 2:
        raise UserError(
            f"the export has lost what was trained: its KL divergence from the trained model is "
            f"{result['kl']:.2e}, that of the model without it {effect:.2e}"
        )


def experts_kept(output: Path, merged: MergedWeights) -> float | None:
    """The share of the experts' change in training that is in the artifact's files, the least of
    all stacks: 1 if all of it is, None if they were not trained. Raises UserError where it is gone.
    """
    files, least = BaseWeights(str(output)), None
    for name in filter(merged.is_experts, merged.names):
        along = total = 0.0
        for start, stop in merged.chunks(name):
            where = {"start": start, "stop": stop}
            before = merged.base.dense(name, device=CPU, **where).float()
            if merged.trained.is_adapter:
                delta = merged.delta(name, **where)
            else:
                delta = merged.rows(name, **where).float() - before
            if delta is not None:
                change = files.dense(name, device=CPU, **where).float() - before
                along += float((change * delta).sum())
                total += float(delta.square().sum())
        if total == 0:
            continue
        if along / total < KEPT:
            raise UserError(
                f"what was trained of {name} has vanished in the export: {along / total:.1%} of "
                "it is left. If it is smaller than this format resolves, take --format adapter"
            )
        least = min(along / total, least or 1.0)
    return least


def reference_logits(merged: MergedWeights, rows: Rows) -> dict[str, Logits]:
    """Of the model as it was trained, the adapter beside its base; of the base; of the adapter
    without its part on the experts.
    """
    trained, base = merged.trained, merged.base
    if not trained.is_adapter:
        return {
            "trained": run(in_memory(merged), rows),
            "base": run(load_model(base, attn_implementation="eager", dequantize=False), rows),
        }
    model = adapted(trained, base)
    logits = {"trained": run(model, rows)}
    with model.disable_adapter():
        logits["base"] = run(model, rows)
    with without_experts(model):
        logits["without_experts"] = run(model, rows)
    return logits


def adapted(trained: RunWeights, base: BaseWeights) -> PeftModel:
    """The base, its experts still in MXFP4, and the adapter's tensors in their place."""
    lora = trained.lora_config()
    config = load_config(base.model_id, revision=base.revision)
    lora = adapted_skeleton(config, lora).peft_config["default"]
    model = load_model(base, attn_implementation="eager", dequantize=False)
    model = get_peft_model(model, lora)
    use_grouped_lora(model)
    tensors = {name: trained.rows(name) for name in trained.shapes}
    report = set_peft_model_state_dict(model, tensors)
    assert not report.unexpected_keys
    return model


@contextmanager
def without_experts(model: PeftModel) -> Iterator[None]:
    """With LoRA on everything but the stacks of experts."""
    modules = [m for m in model.modules() if isinstance(m, ParamWrapper) and m.num_experts > 1]
    scaling = [module.scaling["default"] for module in modules]
    for module in modules:
        module.scaling["default"] = 0.0
    yield
    for module, value in zip(modules, scaling, strict=True):
        module.scaling["default"] = value


def in_memory(merged: MergedWeights) -> GptOssForCausalLM:
    """The model of the merged weights, in bf16, that no file has held."""
    config = load_config(merged.base.model_id, revision=merged.base.revision)
    config._attn_implementation = "eager"
    model = meta_model(config)
    fill(model, cast(BaseWeights, merged), device=PartialState().device, dequantize=True)
    return model


def load_artifact(output: Path, base: BaseWeights, *, form: Format) -> Any:
    """As its users do, by transformers and PEFT. Raises UserError if a weight has no place."""
    source = output if form != "adapter" else base.folder
    if form != "adapter":
        read_names(sorted(set(BaseWeights(str(output)).files.values())))
    is_packed = "quantization_config" in (source / "config.json").read_text()
    model, report = GptOssForCausalLM.from_pretrained(
        source,
        dtype=torch.bfloat16,
        quantization_config=Mxfp4Config(dequantize=True) if is_packed else None,
        attn_implementation="eager",
        output_loading_info=True,
    )
    odd = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if odd:
        raise UserError(f"{output} does not load: {odd[0]} is missing or unknown")
    model = model.to(PartialState().device)
    return PeftModel.from_pretrained(model, output) if form == "adapter" else model
