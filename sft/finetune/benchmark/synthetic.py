"""What bench.py trains: gpt-oss in its true widths with random weights, on random conversations."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

from finetune.model.loading import load_config, meta_model
from finetune.model.mxfp4 import BLOCK_SIZE, Mxfp4Weight
from finetune.model.weights import restore_buffers

# The mean is the default dataset's: 1.5 million tokens in 1,000 conversations. That the lengths are
# lognormal with this sigma is an assumption. It comes from the 107 conversations of
# tests/rehearsal/conversations.jsonl: the logarithm of their lengths in characters has a standard
# deviation of 0.58.
MEAN_LENGTH, SIGMA = 1500, 0.6
SIZES = {"20b": {"num_hidden_layers": 24, "num_local_experts": 32}, "120b": {}}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "vocab_size": 1024,
    "num_hidden_layers": 2,
}


def make_config(size: str, *, num_layers: int | None = None, tiny: bool = False) -> GptOssConfig:
    """The config of a model of random weights.

    size: "20b" or "120b". num_layers: fewer than the model has. tiny: small widths, two layers.
    """
    sizes: dict[str, Any] = SIZES[size] | (TINY if tiny else {})
    if num_layers is not None:
        sizes |= {"num_hidden_layers": num_layers}
    return GptOssConfig(**sizes, use_cache=False, dtype=torch.bfloat16)


def config_of(model: str) -> GptOssConfig:
    """The shapes of a model, given by its name on the hub or its folder.

    The two published sizes are known here, so that the hub need not be reached. Raises UserError
    for any other model that cannot be read.
    """
    sizes = [size for size in SIZES if model.endswith(f"gpt-oss-{size}")]
    return make_config(sizes[0]) if sizes else load_config(model)


def make_model(config: GptOssConfig, *, packed: bool) -> GptOssForCausalLM:
    """A model with random weights on the GPU, if there is one: bf16, or if packed, MXFP4 experts.

    They are made on the device: host memory would not hold those of 120b.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not packed:
        with device:
            return GptOssForCausalLM._from_config(config, dtype=torch.bfloat16)
    model = meta_model(config)
    for name, parameter in list(model.named_parameters()):
        if parameter.ndim == 3:
            weight = torch.nn.Parameter(random_mxfp4(parameter.shape, device), requires_grad=False)
        else:
            values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
            weight = torch.nn.Parameter(
                values.fill_(1) if "norm" in name else values.normal_(std=0.02)
            )
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module).register_parameter(leaf, weight)
    restore_buffers(model, device)
    return model


def random_mxfp4(shape: torch.Size, device: torch.device) -> Mxfp4Weight:
    """Random weights of a stack of experts, (E, in, out): FP4 values times 2^-7, about 0.02."""
    num_experts, inner, out = shape
    groups = (num_experts, out, inner // BLOCK_SIZE)
    blocks = torch.randint(0, 256, (*groups, BLOCK_SIZE // 2), dtype=torch.uint8, device=device)
    return Mxfp4Weight(blocks, torch.full(groups, 127 - 7, dtype=torch.uint8, device=device))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that can do nothing but pad: the conversations are token ids already."""
    pad = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({pad: 0}, unk_token=pad)),
        pad_token=pad,
        eos_token=pad,
    )


def conversations(num_tokens: int, *, max_length: int, vocab_size: int) -> Dataset:
    """Conversations of random tokens, about half as many again as num_tokens.

    Lengths are lognormal and at most max_length; their mean is MEAN_LENGTH at a max_length of 4096,
    and shorter or longer in proportion at another.
    """
    generator = np.random.default_rng(0)
    mean = MEAN_LENGTH * max_length / 4096
    mu = np.log(mean) - SIGMA**2 / 2
    lengths = generator.lognormal(mu, SIGMA, int(num_tokens / mean * 1.5) + 1)
    lengths = lengths.astype(int).clip(8, max_length)
    rows = [generator.integers(0, vocab_size, length).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})
