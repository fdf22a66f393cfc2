"""What an evaluation in training reports: the loss per token, whatever the layout and the ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from trl.trainer.utils import add_fused_lm_head

from finetune.data.harmony_parser import ChannelReader
from finetune.evaluation.scoring import OVERALL, score
from finetune.model.attention import isolate_packed_sequences
from helpers.paths import CPU_ENVS, REPO
from helpers.tiny_trainer import NUM_IN_LOSS, evaluations, tiny_gpt_oss, uneven_rows

FIGURES = ("eval_loss", "eval_mean_token_accuracy", "eval_entropy")


@pytest.fixture(scope="module")
def on_one_rank(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, float]]:
    return evaluations(tiny_model, tmp_path_factory.mktemp("evaluations"))


def test_an_evaluation_is_the_same_for_any_layout_and_is_the_mean_over_tokens(
    on_one_rank: list[dict[str, float]], tiny_model: Path
) -> None:
    for name in FIGURES:
        values = [entry[name] for entry in on_one_rank]
        assert values == pytest.approx([values[0]] * len(values), rel=1e-5), name

    model, total = tiny_gpt_oss(tiny_model).eval(), 0.0
    for row, in_loss in zip(uneven_rows(), NUM_IN_LOSS, strict=True):
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0, -in_loss - 1 : -1]
        total += torch.nn.functional.cross_entropy(
            logits, ids[0, -in_loss:], reduction="sum"
        ).item()
    assert on_one_rank[0]["eval_loss"] == pytest.approx(total / sum(NUM_IN_LOSS), rel=1e-5)


@pytest.mark.parametrize("max_length", [1, 64, 1000])
def test_evaluate_py_scores_what_an_evaluation_in_training_reports(
    max_length: int, on_one_rank: list[dict[str, float]], tiny_model: Path
) -> None:
    model = tiny_gpt_oss(tiny_model).eval()
    isolate_packed_sequences(model)
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    reader = ChannelReader(PreTrainedTokenizerFast.from_pretrained(tiny_model))
    scored = score(model, uneven_rows(), reader, max_length=max_length)[OVERALL]
    assert scored["loss"] == pytest.approx(on_one_rank[0]["eval_loss"], rel=1e-5)
    accuracy = on_one_rank[0]["eval_mean_token_accuracy"]
    assert scored["token_accuracy"] == pytest.approx(accuracy, rel=1e-5)


@pytest.mark.slow
def test_an_evaluation_on_two_ranks_is_that_on_one(
    on_one_rank: list[dict[str, float]], tiny_model: Path, tmp_path: Path
) -> None:
    """Five rows, and as many packed ones as there are ranks or not."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = REPO / "tests/helpers/tiny_trainer.py"
    result = subprocess.run(
        [sys.executable, *ranks, str(script), str(tiny_model), str(tmp_path)],
        env=os.environ | CPU_ENVS,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    on_two_ranks = json.loads((tmp_path / "evaluations.json").read_text())
    for one, two in zip(on_one_rank, on_two_ranks, strict=True):
        for name in FIGURES:
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
