"""Rows that do not divide by the ranks, on real processes."""

import json
from pathlib import Path

import pytest

from helpers.launching import LORA, Launch, losses
from helpers.paths import CONVERSATIONS


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(("fsdp2.yaml",), marks=pytest.mark.long), (*LORA, "--packing=false")],
    ids=["full", "lora"],
)
def test_two_ranks_train_on_three_rows_as_one_rank_does(
    recipe: tuple[str, ...], launch: Launch, tmp_path: Path
) -> None:
    """The loss of the later epochs shows the gradients of those before. So does the evaluation, of
    three other rows, whose loss before the first step is that of the same weights.
    """
    file = tmp_path / "six.jsonl"
    file.write_text("\n".join(CONVERSATIONS.read_text().splitlines()[:6]))
    seen, evaluated = [], []
    for num_processes in (1, 2):
        result = launch(
            *recipe,
            f"--dataset_name={file}",
            f"--output_dir={tmp_path / str(num_processes)}",
            f"--gradient_accumulation_steps={4 // num_processes}",
            "--max_steps=3",
            "--eval_strategy=epoch",
            "--test_split_size=0.5",
            num_processes=num_processes,
        )
        assert result.returncode == 0, result.stderr
        seen.append(losses(result.stdout))
        summary = tmp_path / str(num_processes) / "final/summary.json"
        evaluated.append(json.loads(summary.read_text())["eval_loss"])
    assert seen[1] == pytest.approx(seen[0], rel=2e-3)
    assert evaluated[1][0] == pytest.approx(evaluated[0][0], abs=1e-4)  # summaries have four digits
    assert evaluated[1] == pytest.approx(evaluated[0], rel=2e-3)
