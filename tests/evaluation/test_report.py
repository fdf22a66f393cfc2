"""What is printed of an evaluation, and what is sent to W&B."""

from pathlib import Path

import pytest
import wandb

from finetune.evaluation.report import print_report, send_to_wandb
from helpers.evaluations import EVALUATION
from helpers.launch_records import record_launch


def test_figures_turns_and_their_problems_are_printed_and_brackets_are_no_markup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_report(EVALUATION, title="my run")
    printed = capsys.readouterr().out
    for part in (
        "my run",
        "1,234",
        "2.0000 -> 1.5000",
        "7.389 -> 4.482",
        "50.0% -> 62.5%",
        "0% -> 100%",
        "none -> 100%",
        "[not markup]",
        "(a message is not closed)",
    ):
        assert part in printed, part


def test_an_evaluation_is_sent_to_the_runs_own_wandb_run_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    send_to_wandb(EVALUATION, run_dir=tmp_path)
    assert "not sent" in capsys.readouterr().out and not list(tmp_path.glob("wandb/*"))
    for number, run_id in enumerate([None, "my-id"], start=1):
        record_launch(tmp_path, number, wandb_run_id=run_id)
    send_to_wandb(EVALUATION, run_dir=tmp_path)
    wandb.teardown()  # its service would be shared by the children of later tests
    (run,) = tmp_path.glob("wandb/offline-run-*-my-id")
    logged = (run / "run-my-id.wandb").read_bytes()
    assert b"token_accuracy" in logged and b"valid_harmony" in logged
