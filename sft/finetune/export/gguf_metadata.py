"""What a GGUF file says of itself: the architecture's numbers, the tokenizer, the chat template.

The keys are those that llama.cpp reads (gguf.constants.Keys), so that nothing has to be given
beside the file.
"""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFType, GGUFWriter, LlamaFileType, RopeScalingType, TokenType
from gguf.constants import GGML_QUANT_VERSION, MODEL_ARCH, MODEL_ARCH_NAMES
from transformers import GptOssConfig, PreTrainedTokenizerBase

from finetune.errors import UserError

ARCHITECTURE = MODEL_ARCH_NAMES[MODEL_ARCH.GPT_OSS]
# llama.cpp's name for the regular expression that cuts text into words before BPE: that of
# o200k_base, the vocabulary of GPT-4o and of gpt-oss.
PRE_TOKENIZER = "gpt-4o"


def model_writer(file: Path, config: GptOssConfig, *, name: str) -> GGUFWriter:
    """A writer for a whole model that holds the architecture's numbers, and no tensor yet.

    name: shown by the programs that load the file. Raises UserError if the config has what
    llama.cpp's gpt-oss does not compute.
    """
    writer = GGUFWriter(file, ARCHITECTURE)
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_license("apache-2.0")
    writer.add_file_type(LlamaFileType.MOSTLY_MXFP4_MOE)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    add_rope(writer, config.rope_parameters)
    return writer


def add_rope(writer: GGUFWriter, rope: dict[str, Any]) -> None:
    """Add the rotary embedding's numbers. Raises UserError if it is not scaled by YaRN."""
    if rope["rope_type"] != "yarn":
        raise UserError(
            f"the model's rotary embedding is {rope['rope_type']!r}, and gpt-oss's is 'yarn': "
            "GGUF is written for gpt-oss alone"
        )
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int
) -> None:
    """Add tokens, merges, the ids of special tokens, and the chat template.

    vocab_size: rows of the embedding. It has more than the tokenizer has tokens; llama.cpp wants a
    token for each.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [f"[PAD{token}]" for token in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, TokenType.NORMAL
    for number, added in tokenizer.added_tokens_decoder.items():
        tokens[number] = added.content
        types[number] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    # tokenizers writes a merge as a pair since 0.20, before that as one string.
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)  # harmony's renderer writes every special token itself
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def adapter_writer(file: Path, *, name: str, alpha: float) -> GGUFWriter:
    """A writer for a LoRA adapter. llama.cpp multiplies B A by alpha / r."""
    writer = GGUFWriter(file, ARCHITECTURE)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    return writer
