"""Runs of train.py that hold a share out, and evaluate.py on what they leave."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import GptOssForCausalLM, Mxfp4Config
from trl.trainer.utils import add_fused_lm_head

from evaluate import EvaluateArguments, evaluate
from finetune.arguments import parse_args
from finetune.data.dataset import load_datasets
from finetune.data.harmony_parser import ChannelReader
from finetune.errors import UserError
from finetune.evaluation.scoring import score
from finetune.model.loading import load_model, load_tokenizer
from finetune.model.weights import BaseWeights
from helpers.launching import Launch, defaults, losses

HELD_OUT = ("--eval_strategy=steps", "--eval_steps=100", "--test_split_size=0.08")
LORA = ("--use_peft=true", "--lora_r=8", "--lora_alpha=16", "--lora_dropout=0")


def held_out_tokens(tiny_model: Path, run_dir: Path, *, date: str) -> Dataset:
    """The held-out conversations as training tokenises them."""
    flags = [*defaults(tiny_model, run_dir.parent), *HELD_OUT, f"--conversation_start_date={date}"]
    config = parse_args(flags)
    tokenizer = load_tokenizer(str(tiny_model))
    held_out = load_datasets(config.script, config.training, config.data, tokenizer)[1]
    assert held_out is not None
    return held_out


def losses_in_fp32(model: Any, tokens: Dataset, tokenizer: Any) -> dict[str, list[float]]:
    """The loss of each token in the loss, by channel, got another way than scoring.py does.

    One conversation at a time, from all logits; the channel is read from the decoded text.
    """
    found: dict[str, list[float]] = {}
    for row in tokens:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        token_losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        starts = (ids == tokenizer.convert_tokens_to_ids("<|start|>")).nonzero()[:, 0].tolist()
        for first, after in zip(starts, [*starts[1:], len(ids)], strict=True):
            text = tokenizer.decode(ids[first:after])
            name = text.split("<|channel|>")[1].split("<|")[0] if "<|channel|>" in text else ""
            name = name if name in ("analysis", "commentary", "final") else "other"
            for index in range(max(first, 1), after):
                if labels[index] != -100:
                    found.setdefault(name, []).append(float(token_losses[index - 1]))
    return found


def stock_model(folder: Path) -> GptOssForCausalLM:
    return GptOssForCausalLM.from_pretrained(
        folder,
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )


def check_channels(evaluation: dict[str, Any]) -> None:
    """The channels' losses, weighted by their tokens, are the overall one."""
    channels = {name: row for name, row in evaluation["loss"].items() if name != "overall"}
    overall = evaluation["loss"]["overall"]
    assert {"analysis", "final"} <= set(channels)
    assert sum(row["tokens"] for row in channels.values()) == overall["tokens"]
    for when in (0, 1):
        total = sum(row["loss"][when] * row["tokens"] for row in channels.values())
        assert total / overall["tokens"] == pytest.approx(overall["loss"][when])
        right = sum(row["token_accuracy"][when] * row["tokens"] for row in channels.values())
        assert right / overall["tokens"] == pytest.approx(overall["token_accuracy"][when])


def test_a_resumed_lora_run_is_evaluated_from_its_base_and_the_losses_are_right(
    launch: Launch, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, flags = tmp_path / "run", (*LORA, *HELD_OUT)
    first = launch("ddp.yaml", *flags)
    assert first.returncode == 0, first.stderr
    summary = json.loads((run / "final/summary.json").read_text())
    before, after = summary["eval_loss"]
    assert after < before and "eval loss" in first.stdout and " -> " in first.stdout
    assert first.stdout.count("· evaluation · loss ") == 2  # before the first step, after the last

    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-4")
    resumed = launch("ddp.yaml", *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert "checkpoint-2" in resumed.stdout and len(losses(resumed.stdout)) == 2
    assert resumed.stdout.count("· evaluation · loss ") == 1
    assert json.loads((run / "final/summary.json").read_text())["eval_loss"] == [before, after]
    assert (run / "final/loss.png").read_bytes()[:4] == b"\x89PNG"

    evaluation = evaluate(run, EvaluateArguments(num_generations=2, max_new_tokens=6))
    assert evaluation == json.loads((run / "final/evaluation.json").read_text())
    overall = evaluation["loss"]["overall"]
    # Both are per token, but in bf16, where other batches and packing round differently.
    assert overall["loss"] == pytest.approx([before, after], rel=0.01)
    assert overall["loss"][1] < overall["loss"][0]
    assert overall["perplexity"][1] == pytest.approx(
        torch.tensor(overall["loss"][1]).exp().item(), rel=1e-4
    )
    check_channels(evaluation)
    assert len(evaluation["generations"]) == 2 and evaluation["cut_short"] == [1.0, 1.0]
    assert evaluation["valid_harmony"] == [0.0, 0.0]
    assert "before -> after" in capsys.readouterr().out

    tokens = held_out_tokens(tiny_model, run, date=summary["run"]["conversation_start_date"])
    tokenizer = load_tokenizer(str(tiny_model))
    base = stock_model(tiny_model)
    for when in (0, 1):
        model = PeftModel.from_pretrained(base, run / "final").eval() if when else base
        expected = losses_in_fp32(model, tokens, tokenizer)
        for name, values in expected.items():
            row = evaluation["loss"][name]
            assert row["tokens"] == len(values), name
            assert row["loss"][when] == pytest.approx(sum(values) / len(values), rel=2e-3), name


@pytest.mark.long
def test_a_run_of_all_weights_is_evaluated_from_its_artifact_alone(
    launch: Launch, tmp_path: Path
) -> None:
    result = launch("fsdp2.yaml", *HELD_OUT)
    assert result.returncode == 0, result.stderr
    before, after = json.loads((tmp_path / "run/final/summary.json").read_text())["eval_loss"]
    # Given the artifact's own folder, which may have been downloaded without the rest.
    evaluation = evaluate(
        tmp_path / "run/final", EvaluateArguments(num_generations=1, max_new_tokens=4)
    )
    overall = evaluation["loss"]["overall"]
    assert overall["loss"] == pytest.approx([before, after], rel=0.01)
    assert overall["loss"][1] < overall["loss"][0]
    check_channels(evaluation)


def test_packed_weights_and_packed_rows_score_as_bf16_weights_and_single_rows_do(
    tiny_model: Path, tmp_path: Path
) -> None:
    tokens = held_out_tokens(tiny_model, tmp_path / "run", date="2026-01-02")
    reader = ChannelReader(load_tokenizer(str(tiny_model)))
    scores = []
    for dequantize, max_length in ((False, 1), (True, 1), (False, 1000)):
        weights = BaseWeights(str(tiny_model))
        model = load_model(weights, attn_implementation="eager", dequantize=dequantize)
        add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
        scores.append(score(model, tokens, reader, max_length=max_length))
    alone, dense, packed = scores
    for name, row in alone.items():
        assert row == pytest.approx(dense[name], rel=1e-5), name
        assert row == pytest.approx(packed[name], rel=1e-3, abs=1e-2), name
        assert row["tokens"] == packed[name]["tokens"]


def test_a_run_that_is_missing_unfinished_or_held_nothing_out_is_refused(tmp_path: Path) -> None:
    args = EvaluateArguments()
    with pytest.raises(UserError, match="there is no run at"):
        evaluate(tmp_path / "nowhere", args)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="has not finished"):
        evaluate(tmp_path / "run", args)
    summary = tmp_path / "run/final/summary.json"
    summary.parent.mkdir()
    summary.write_text('{"steps": 4')
    with pytest.raises(UserError, match="is torn"):
        evaluate(tmp_path / "run", args)
    summary.write_text('{"steps": 4}')
    with pytest.raises(UserError, match="does not say what was trained"):
        evaluate(tmp_path / "run", args)
    run = {"model": "m", "model_revision": "r", "dataset": "d", "seed": 0, "use_peft": True}
    summary.write_text(json.dumps({"run": run | {"eval_strategy": "no"}}))
    with pytest.raises(UserError, match="held nothing out: give --dataset"):
        evaluate(tmp_path / "run", args)
