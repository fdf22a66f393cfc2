"""Prompts are those of a server; generated turns end where they should; shares are right."""

import json
from pathlib import Path

import torch
from openai_harmony import HarmonyEncoding
from peft import get_peft_model
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from finetune.data.conversations import to_conversation
from finetune.data.harmony import Encoder
from finetune.data.harmony_parser import Turn
from finetune.data.options import DataArguments
from finetune.evaluation.generation import (
    Prompt,
    eager_attention,
    generate,
    make_prompt,
    shares,
    until_end,
)
from finetune.model.loading import load_model, load_tokenizer
from finetune.model.lora import lora_config
from finetune.model.weights import BaseWeights
from helpers.harmony_reference import DATE, reference
from helpers.paths import CONVERSATIONS


def test_a_prompt_is_what_the_server_sends(
    vllms: HarmonyEncoding,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoder, data_args = Encoder(tokenizer), DataArguments(conversation_start_date=DATE)
    opening = vllms.encode("<|start|>assistant", allowed_special="all")
    for line in CONVERSATIONS.read_text().splitlines()[:20]:
        row = json.loads(line)
        conversation = to_conversation(row)
        prompt = make_prompt(conversation, encoder, data_args)
        assert prompt is not None and prompt.language == row["reasoning_language"]
        turns = conversation["messages"]
        last = max(number for number, turn in enumerate(turns) if turn["role"] == "user")
        asked = conversation | {"messages": turns[: last + 1]}
        assert prompt.ids == [*reference(vllms, asked), *opening]
        assert prompt.question == turns[last]["content"] and not prompt.has_tools
    assert make_prompt({"text": "no conversation"}, encoder, data_args) is None


def test_padding_after_the_end_of_a_turn_is_cut_off() -> None:
    assert until_end([5, 6, 2, 1, 1], [2, 3]) == [5, 6, 2]
    assert until_end([5, 6, 7], [2, 3]) == [5, 6, 7]


def test_attention_is_eager_during_generation_and_only_then(tiny_model: Path) -> None:
    """In every layer, also through PEFT. A cache and padding do not change what is generated."""
    weights = BaseWeights(str(tiny_model))
    base = load_model(weights, attn_implementation="eager", dequantize=False)
    lora = lora_config(base, ModelConfig(use_peft=True, lora_dropout=0.0))
    model = get_peft_model(base, lora)
    base.config._attn_implementation = "flash_attention_4"  # it cannot run here
    layers = base.model.layers
    with eager_attention(model):
        assert {layer.self_attn.config._attn_implementation for layer in layers} == {"eager"}
        generated = model.generate(
            torch.tensor([[5, 6, 7, 8]]), max_new_tokens=4, do_sample=False, eos_token_id=-1
        )[0, 4:].tolist()
    kept = {layer.self_attn.config._attn_implementation for layer in layers}
    assert kept == {"flash_attention_4"}
    prompts = [Prompt(ids, "?", False, None) for ids in ([5, 6, 7, 8], list(range(20, 60)))]
    short, _ = generate(model, load_tokenizer(str(tiny_model)), prompts, max_new_tokens=4)
    assert short == generated


def test_shares_count_valid_cut_and_well_asked_turns_and_are_none_of_nothing() -> None:
    french, klingon = (Prompt([], "?", False, language) for language in ("French", "Klingon"))
    turns = [
        Turn([("analysis", "Il faut dire que non."), ("final", "No.")]),
        Turn([("analysis", "The answer is that it is not.")], "a message is not closed"),
        Turn([("analysis", "nuqneH")]),
        Turn([("final", "No.")], "it ends without a final answer"),
    ]
    generated = [[1, 2], [1, 2, 3], [1], [1]]
    counted = shares(turns, generated, [french, french, klingon, french], max_new_tokens=3)
    assert counted == {"valid_harmony": 0.5, "cut_short": 0.25, "analysis_in_language": 0.5}
    nothing = shares([], [], [], max_new_tokens=3)
    assert set(nothing.values()) == {None}
