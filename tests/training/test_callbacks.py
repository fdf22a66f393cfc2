"""FLOPs and throughput, compared with figures obtained in another way."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GptOssConfig, GptOssForCausalLM, TrainerControl, TrainerState
from trl import SFTConfig

from finetune.model.flops import flops_per_token
from finetune.training.callbacks import EvaluateAtEnd, Throughput


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


def clock_of(*readings: float) -> Callable[[], float]:
    """A clock that shows these seconds, one after the other."""
    remaining = iter(readings)
    return lambda: next(remaining)


def test_throughput_is_tokens_since_the_last_log() -> None:
    clock = clock_of(0.0, 0.0, 10.0, 14.0, 20.0)
    throughput = Throughput(1.0, num_processes=2, clock=clock)
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


def test_the_time_of_an_evaluation_is_in_no_rate() -> None:
    throughput = Throughput(1.0, num_processes=1, clock=clock_of(0.0, 0.0, 30.0, 40.0))
    state = TrainerState(num_input_tokens_seen=0)
    throughput.on_train_begin(None, state, None)
    throughput.on_evaluate(None, state, None, {"eval_runtime": 20.0})
    entry = {"loss": 2.0}
    state.num_input_tokens_seen = 1000
    throughput.on_log(None, state, None, entry)
    assert entry["tokens_per_sec_per_gpu"] == 100.0
    assert throughput.summary(state)["tokens_per_sec_per_gpu"] == 50.0


@pytest.mark.parametrize(("step", "evaluates"), [(3, False), (4, True)])
def test_a_run_that_evaluates_by_steps_does_so_after_its_last_step(
    step: int, evaluates: bool, tmp_path: Path
) -> None:
    args = SFTConfig(output_dir=str(tmp_path), eval_strategy="steps", eval_steps=3, use_cpu=True)
    control = TrainerControl()
    state = TrainerState(global_step=step, max_steps=4)
    EvaluateAtEnd().on_step_end(args, state, control)
    assert control.should_evaluate is evaluates
