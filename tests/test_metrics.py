"""FLOPs and throughput, against figures got another way."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GptOssConfig, GptOssForCausalLM, TrainerState

from metrics import Throughput, flops_per_token


def test_flops_are_those_that_torch_counts() -> None:
    """With every expert visited, a token costs what FlopCounterMode sees, forward and backward."""
    config = GptOssConfig(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=2,
        num_experts_per_tok=2,
        vocab_size=512,
        sliding_window=4096,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = GptOssForCausalLM(config)
    num_tokens = 64
    ids = torch.arange(num_tokens)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    # Eager attention computes all keys, not the causal half: a context of twice the length.
    formula = num_tokens * flops_per_token(config, context=2 * num_tokens, lora=False)
    # The gradient of the embedding's output is not needed by a matrix product below it.
    assert counter.get_total_flops() == pytest.approx(formula, rel=0.02)


def test_active_parameters_of_gpt_oss_20b() -> None:
    """OpenAI's model card: 3.6 B active parameters, the unembedding counted, the embedding not."""
    config = GptOssConfig(num_hidden_layers=24, num_local_experts=32)
    assert flops_per_token(config, context=0, lora=True) / 4 == pytest.approx(3.6e9, rel=0.03)
    assert flops_per_token(config, context=0, lora=False) / 6 == pytest.approx(3.6e9, rel=0.03)


def test_throughput_is_tokens_since_the_last_log(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 10.0, 14.0, 20.0])
    monkeypatch.setattr("metrics.time.monotonic", lambda: next(clock))
    throughput = Throughput(1.0, num_processes=2)
    state = TrainerState(num_input_tokens_seen=1000, global_step=5)
    throughput.on_train_begin(None, state, None)
    first, second = {"loss": 2.0}, {"loss": 1.5}
    state.num_input_tokens_seen = 1400
    throughput.on_log(None, state, None, first)
    state.num_input_tokens_seen = 1480
    throughput.on_log(None, state, None, second)
    assert first["tokens_per_sec_per_gpu"] == 20.0
    assert second["tokens_per_sec_per_gpu"] == 10.0
    state.log_history = [first, second, {"train_runtime": 1.0}]
    summary = throughput.summary(state)
    assert summary["tokens"] == 1480 and summary["final_loss"] == 1.5
    assert summary["tokens_per_sec_per_gpu"] == 12.0
