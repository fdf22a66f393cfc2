"""What an export has lost, measured on the artifact as its users load it.

Two things are measured. The weights on disk are compared with those of the base: is the change that
training made to the experts in them? And the artifact's predictions are compared with those of the
model as it was trained.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from transformers import GptOssForCausalLM, Mxfp4Config

from finetune.errors import UserError
from finetune.export.divergence import Logits, Rows, compare_logits, divergence, logits_of, loss
from finetune.export.gguf_adapter import ADAPTER as GGUF_ADAPTER
from finetune.export.gguf_model import MODEL
from finetune.export.gguf_weights import GgufWeights
from finetune.export.merge import MergedWeights, adapted_skeleton
from finetune.export.record import Format
from finetune.export.source import RunWeights, read_names
from finetune.model.experts import use_grouped_lora
from finetune.model.loading import load_config, load_model, meta_model
from finetune.model.weights import BaseWeights, WeightSource, fill

# Two correct kernels differ by less than this KL. If training changed the predictions by no more,
# they cannot show whether the change is there; only the weights can.
NOISE_KL = 1e-4
REQUANTISED = ("mxfp4", "gguf")  # the formats that write experts back to MXFP4
KEPT = 0.01  # the share of a stack's change below which it counts as lost


def measure_fidelity(
    output: Path, merged: MergedWeights, rows: Rows, *, form: Format
) -> dict[str, Any]:
    """Compare the artifact in `output` with the trained model; the keys are those of
    card_figures.LABELS.

    rows: input_ids and labels of the conversations to compare on. Raises UserError if the artifact
    lacks what was trained.
    """
    # The weights first: that takes little memory, and a lost change shows in them for certain.
    kept = experts_kept(output, merged, form=form) if form != "adapter" else None
    result = compare_predictions(output, merged, rows, form=form)
    check_effect(result, form=form)
    return result if kept is None else result | {"experts_kept": kept}


def compare_predictions(
    output: Path, merged: MergedWeights, rows: Rows, *, form: Format
) -> dict[str, Any]:
    """Run the trained model, the base and the artifact, one at a time in memory, and compare them.

    effect_kl is the KL of the base from the trained model: how much training changed, for
    comparison. experts_effect_kl: the same of the trained model without LoRA on its experts.
    """
    references = reference_logits(merged, rows)
    trained = references["trained"]
    exported = logits_of(load_artifact(output, merged, form=form), rows)
    result: dict[str, Any] = compare_logits(trained, exported, rows) | {
        "loss_trained": loss(trained, rows),
        "loss_base": loss(references["base"], rows),
        "effect_kl": divergence(trained, references["base"]),
    }
    if "without_experts" in references:
        result["experts_effect_kl"] = divergence(trained, references["without_experts"])
    if form in REQUANTISED:
        # The merged weights in bf16 tell what merging costs, and so what re-quantisation adds.
        is_adapter = merged.run_weights.is_adapter
        bf16 = logits_of(in_memory(merged, merged.base), rows) if is_adapter else trained
        result |= {"kl_bf16": divergence(trained, bf16), "loss_bf16": loss(bf16, rows)}
    return result


def check_effect(result: dict[str, Any], *, form: Format) -> None:
    """Raise UserError if the artifact is about as far from the trained model as it would be without
    the training of its experts.

    Experts in MXFP4 are exempt: re-quantisation can cost as much as a short training gave. That is
    measured and becomes a hint.
    """
    effect = result.get("experts_effect_kl", result["effect_kl"])
    if form not in REQUANTISED and effect > NOISE_KL and result["kl"] > effect / 2:
        raise UserError(
            f"the export has lost what was trained: its KL divergence from the trained model is "
            f"{result['kl']:.2e}, that of the model without it {effect:.2e}"
        )


def fidelity_hints(fidelity: dict[str, Any], *, form: Format, is_adapter: bool) -> list[str]:
    """Sentences for the user on what re-quantisation to MXFP4 costs; none for other formats."""
    if form not in REQUANTISED:
        return []
    lost = fidelity["kl"] - fidelity["kl_bf16"]
    hints = [
        f"re-quantisation costs {lost:.2e} nats a token of KL and "
        f"{fidelity['loss'] - fidelity['loss_bf16']:+.4f} of loss; training moved the model by "
        f"{fidelity['effect_kl']:.2e}"
    ]
    if is_adapter and fidelity["kl"] > 0.1 * fidelity["effect_kl"]:
        separate = "gguf-adapter" if form == "gguf" else "adapter"
        hints.append(
            "that is over a tenth of what training changed: better keep the adapter separate, "
            f"beside the published MXFP4 base (--format {separate}), or serve bf16"
        )
    return hints


def experts_kept(output: Path, merged: MergedWeights, *, form: Format) -> float | None:
    """The share of the experts' change in training that the artifact's files hold: 1 is all of it.

    Of each stack of experts the change on disk is projected on the change in training. The least of
    all stacks is returned, or None if no stack was trained. Raises UserError if one has vanished.
    """
    files, least = artifact_weights(output, merged, form=form), None
    for name in filter(merged.is_experts, merged.names):
        along = total = 0.0
        for start, stop in merged.chunks(name):
            before = merged.base.dense(name, start=start, stop=stop).float()
            if merged.run_weights.is_adapter:
                # Not the merged weights: a mistake in merging would be in both and not show.
                delta = merged.delta(name, start=start, stop=stop)
            else:
                delta = merged.rows(name, start=start, stop=stop).float() - before
            if delta is not None:
                change = files.dense(name, start=start, stop=stop).float() - before
                along += float((change * delta).sum())
                total += float(delta.square().sum())
        if total == 0:
            continue
        share = along / total
        if share < KEPT:
            raise UserError(
                f"what was trained of {name} has vanished in the export: {share:.1%} of "
                "it is left. If it is smaller than this format resolves, take --format adapter"
            )
        least = share if least is None else min(share, least)
    return None if least is None else min(least, 1.0)


def reference_logits(
    merged: MergedWeights, rows: Rows, *, scalings: dict[str, float] | None = None
) -> dict[str, Logits]:
    """Logits of the model as it was trained ("trained") and of the base ("base").

    With LoRA the trained model is the base with the adapter beside it, nothing merged; and
    "without_experts" are the logits of that model without LoRA on its experts. scalings: names and
    factors, for the logits of that model with LoRA multiplied by each factor.
    """
    run_weights, base = merged.run_weights, merged.base
    if not run_weights.is_adapter:
        return {
            "trained": logits_of(in_memory(merged, base), rows),
            "base": logits_of(
                load_model(base, attn_implementation="eager", dequantize=False), rows
            ),
        }
    model = adapted_model(run_weights, base)
    logits = {"trained": logits_of(model, rows)}
    with model.disable_adapter():
        logits["base"] = logits_of(model, rows)
    with without_experts(model):
        logits["without_experts"] = logits_of(model, rows)
    modules = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for name, factor in (scalings or {}).items():
        with scaled(modules, factor):
            logits[name] = logits_of(model, rows)
    return logits


def adapted_model(run_weights: RunWeights, base: BaseWeights) -> PeftModel:
    """The base, its experts still in MXFP4, with the run's adapter beside it."""
    config = load_config(base.model_id, revision=base.revision)
    lora = adapted_skeleton(config, run_weights.lora_config()).peft_config["default"]
    model = load_model(base, attn_implementation="eager", dequantize=False)
    model = get_peft_model(model, lora)
    use_grouped_lora(model)
    tensors = {name: run_weights.rows(name) for name in run_weights.shapes}
    report = set_peft_model_state_dict(model, tensors)
    assert not report.unexpected_keys
    return model


def without_experts(model: PeftModel) -> AbstractContextManager[None]:
    """Switch LoRA off on the stacks of experts, and leave it on everywhere else."""
    modules = [m for m in model.modules() if isinstance(m, ParamWrapper) and m.num_experts > 1]
    return scaled(modules, 0.0)


@contextmanager
def scaled(modules: Iterable[LoraLayer], factor: float) -> Iterator[None]:
    """Multiply what LoRA adds in these modules by a factor."""
    scaling = {module: module.scaling["default"] for module in modules}
    for module, value in scaling.items():
        module.scaling["default"] = factor * value
    yield
    for module, value in scaling.items():
        module.scaling["default"] = value


def in_memory(weights: WeightSource, base: BaseWeights) -> GptOssForCausalLM:
    """A model of these weights in bf16, straight from where they are read or computed."""
    config = load_config(base.model_id, revision=base.revision)
    config._attn_implementation = "eager"
    model = meta_model(config)
    fill(model, weights, device=PartialState().device, dequantize=True)
    return model


def artifact_weights(output: Path, merged: MergedWeights, *, form: Format) -> WeightSource:
    """The weights of the model that an artifact makes, read from its files."""
    if form in ("gguf", "gguf-adapter"):
        return GgufWeights(merged, output / (MODEL if form == "gguf" else GGUF_ADAPTER))
    return BaseWeights(str(output))


def load_artifact(output: Path, merged: MergedWeights, *, form: Format) -> Any:
    """Load the artifact as its users do, with transformers and PEFT alone; of GGUF its weights,
    because transformers does not run it.

    Raises UserError if a weight is missing or unknown, or if a file is cut off.
    """
    if form in ("gguf", "gguf-adapter"):
        return in_memory(artifact_weights(output, merged, form=form), merged.base)
    source = output if form != "adapter" else merged.base.folder
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
