"""The small files beside the weights: tokenizer, chat template, config, generation config."""

import json
import shutil
from pathlib import Path

from finetune.export.record import Format
from finetune.model.loading import load_tokenizer, save_tokenizer
from finetune.model.weights import BaseWeights

# As config.json of openai/gpt-oss-20b has it; used if the base's own config has none, because that
# base is not quantized.
QUANTIZATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


def write_tokenizer(base: BaseWeights, output: Path) -> None:
    """Write the base's tokenizer and its chat template."""
    save_tokenizer(load_tokenizer(base.model_id, revision=base.revision), output)


def write_config(base: BaseWeights, output: Path, *, form: Format) -> None:
    """Write the base's config.json, changed to what is exported, and its generation config."""
    config = json.loads((base.folder / "config.json").read_text())
    quantization = config.pop("quantization_config", QUANTIZATION)
    config |= {"architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
    config.pop("torch_dtype", None)  # the older name of dtype
    if form == "mxfp4":
        config["quantization_config"] = quantization
    (output / "config.json").write_text(json.dumps(config, indent=2))
    generation_config = base.folder / "generation_config.json"
    if generation_config.exists():
        shutil.copyfile(generation_config, output / generation_config.name)
