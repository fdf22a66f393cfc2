"""Make a tiny gpt-oss on the spot: own tokenizer with harmony's tokens, random MXFP4 weights.

    python tests/rehearsal/tiny_gpt_oss.py FOLDER CONVERSATIONS.jsonl

Names, shapes, dtypes and config.json are those of the published checkpoints, so the loading path is
the real one.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast
from trl import chat_template_utils

SPECIAL_TOKENS = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
    "<|endofprompt|>",
]


def make_tokenizer(texts: list[str], *, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on texts, with gpt-oss's special tokens and chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
    )
    templates = Path(chat_template_utils.__file__).parent / "chat_templates"
    fast.chat_template = (templates / "gptoss.jinja").read_text()
    return fast


def tiny_config(tokenizer: PreTrainedTokenizerFast, **sizes: int) -> GptOssConfig:
    """gpt-oss's architecture in small: both kinds of layers, more experts than a token visits."""
    tiny = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_local_experts": 4,
    }
    return GptOssConfig(
        **(tiny | sizes),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts_per_tok=2,
        sliding_window=32,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        router_aux_loss_coef=0.9,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def random_mxfp4(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks (E, out, in/32, 16) and scales (E, out, in/32), uint8, of std about 0.02.

    A byte holds two FP4 values, a scale the exponent of a power of two with bias 127 (OCP MX,
    v1.0).
    """
    num_experts, out, inner = shape
    blocks = torch.randint(0, 256, (num_experts, out, inner // 32, 16), dtype=torch.uint8)
    scales = torch.full((num_experts, out, inner // 32), 127 - 7, dtype=torch.uint8)
    return blocks, scales


def save_tiny_gpt_oss(
    folder: Path,
    texts: list[str],
    *,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **sizes: int,
) -> Path:
    """Write config, tokenizer and MXFP4 weights to folder, in the published checkpoint's layout.

    texts: what a tokenizer is trained on, unless one is given. sizes: of the model, other than the
    tiny one's, as GptOssConfig names them.
    """
    torch.manual_seed(seed)
    tokenizer = tokenizer or make_tokenizer(texts)
    config = tiny_config(tokenizer, **sizes)
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            num_experts, inner, out = tensor.shape
            blocks, scales = random_mxfp4(num_experts, out, inner)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            tensors[name] = tensor.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    config.architectures = ["GptOssForCausalLM"]
    as_dict = config.to_dict() | {
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }
    (folder / "config.json").write_text(json.dumps(as_dict, indent=2))
    model.generation_config.save_pretrained(folder)
    return folder


def conversation_texts(file: Path) -> list[str]:
    """The text of every message of a .jsonl file of conversations."""
    rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    return [message["content"] or "" for row in rows for message in row["messages"]]


if __name__ == "__main__":
    save_tiny_gpt_oss(Path(sys.argv[1]), conversation_texts(Path(sys.argv[2])))
