"""Load gpt-oss for training: its config, its tokenizer, and the model itself.

The model is built without weights, on the meta device. Its weights are then read straight to where
they are trained, so that no process ever holds a second copy of them.
"""

import json
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedTokenizerBase,
)

from finetune.errors import UserError
from finetune.model.attention import isolate_packed_sequences
from finetune.model.experts import EXPERTS_IMPLEMENTATION, register_experts
from finetune.model.norms import use_fused_norms
from finetune.model.rotary import use_fused_rotary
from finetune.model.unpacking_probe import choose_unpacking
from finetune.model.weights import BaseWeights, fill


def load_config(model_id: str, *, revision: str = "main") -> GptOssConfig:
    """Read the model's config. Raises UserError if it cannot be read or is not gpt-oss."""
    try:
        config = AutoConfig.from_pretrained(model_id, revision=revision)
    except Exception as error:  # a damaged config.json makes transformers raise almost anything
        raise UserError(
            f"model {model_id!r} cannot be read: give a hub name (is the hub reachable?) "
            f"or a folder with config.json; {(str(error).splitlines() or [''])[0]}"
        ) from error
    if config.model_type != "gpt_oss":
        raise UserError(
            f"model {model_id!r} is {config.model_type!r}, not gpt_oss: set MODEL to "
            "openai/gpt-oss-20b, openai/gpt-oss-120b or a fine-tune of one"
        )
    return config


def load_tokenizer(model_id: str, *, revision: str = "main") -> PreTrainedTokenizerBase:
    """Read the tokenizer with its chat template. Raises UserError if it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(model_id, revision=revision)
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if Path(model_id).is_dir() and not (Path(model_id) / "tokenizer.json").exists():
            reason = "the folder holds no tokenizer.json: copy it from the model it was made from"
        raise UserError(f"the tokenizer of {model_id!r} cannot be read; {reason}") from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer and its chat template so that transformers 4 and 5 load them."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    # transformers 5.23.0 writes TokenizersBackend, its new name of this class, and transformers 4
    # (4.57.1 was tried) ends with "Tokenizer class TokenizersBackend does not exist".
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2))


def meta_model(config: GptOssConfig) -> GptOssForCausalLM:
    """gpt-oss in bf16 without any weights: its parameters have shapes and no values."""
    if hasattr(config, "quantization_config"):
        # The published config names MXFP4. transformers would save it with the trained weights,
        # which are not quantized, and then read those as MXFP4.
        del config.quantization_config
    with torch.device("meta"):
        # Not from_config: under ZeRO-3 it partitions the weights at once, before they are read.
        return GptOssForCausalLM(config).to(torch.bfloat16)


def load_model(
    weights: BaseWeights,
    *,
    attn_implementation: str,
    dequantize: bool = True,
    num_tokens: int | None = None,
) -> GptOssForCausalLM:
    """gpt-oss with its weights where this process will train them.

    The weights are in bf16, except for experts stored in MXFP4: those stay packed and frozen unless
    dequantize is set. Under FSDP2 the model stays on the meta device, because each rank should read
    only its share: that is done by weights.shard_and_fill, once the adapter is added.

    num_tokens: how many the model is mostly given at once, if it is known. How to multiply with
    packed weights is then chosen for so many.

    Raises UserError if MXFP4 weights would have to be sharded.
    """
    config = load_config(weights.model_id, revision=weights.revision)
    config.use_cache = False
    config._attn_implementation = attn_implementation
    config._experts_implementation = EXPERTS_IMPLEMENTATION
    config.dtype = torch.bfloat16
    register_experts()
    model = meta_model(config)
    with suppress(OSError):  # generation_config.json is optional
        model.generation_config = GenerationConfig.from_pretrained(
            weights.model_id, revision=weights.revision
        )
    isolate_packed_sequences(model)
    use_fused_norms(model)
    use_fused_rotary()

    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP")
    offloaded = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    if (sharded or offloaded) and not dequantize:
        raise UserError(
            "an MXFP4 base is not sharded, every GPU holds all of it: set ACCELERATE_CONFIG to "
            "/sft/ddp.yaml, or add --dequantize true"
        )
    is_packed = any(weights.is_packed(name) for name, _ in model.named_parameters())
    if is_packed and not dequantize and num_tokens is not None:
        choose_unpacking(config, num_tokens=num_tokens)
    if not sharded:
        # DeepSpeed takes a model that is complete on the CPU, and partitions and moves it itself.
        device = torch.device("cpu") if offloaded else PartialState().device
        fill(model, weights, device=device, dequantize=dequantize)
    return model
