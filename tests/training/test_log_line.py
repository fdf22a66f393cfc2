"""One line for each log entry, and numbers for W&B."""

import pytest
from transformers import TrainerState

from finetune.training.log_line import LogLine, duration
from helpers.paths import REPO
from rehearse import LOGGED_STEP

ENTRY = {
    "loss": 1.2341,
    "grad_norm": 0.5,
    "learning_rate": 1.9e-4,
    "tokens_per_sec_per_gpu": 3120.4,
    "mfu": 0.3104,
    "peak_memory_gib": 71.24,
    "epoch": 0.1,
}


def test_a_step_is_a_line_with_the_time_left_at_the_pace_of_this_launch(
    capsys: pytest.CaptureFixture[str],
) -> None:
    times = iter([100.0, 160.0])
    line = LogLine(clock=lambda: next(times))
    state = TrainerState(global_step=100, max_steps=2400, is_world_process_zero=True)
    line.on_step_begin(None, state, None)  # of a run that was resumed at step 100
    state.global_step = 120
    line.on_log(None, state, None, dict(ENTRY))  # 20 steps in 60 s: 2,280 in 1 h 54 min
    assert capsys.readouterr().out == (
        "step 120/2400 · 1 h 54 min left · loss 1.234 · lr 1.9e-04 · 3,120 tok/s/gpu · MFU 31.0% "
        "· 71.2 GiB\n"
    )


def test_an_evaluation_is_a_line_and_the_last_entry_and_other_ranks_print_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = LogLine()
    state = TrainerState(global_step=0, max_steps=8, is_world_process_zero=True)
    entry = {"eval_loss": 2.0, "eval_mean_token_accuracy": 0.6123, "eval_runtime": 34.6}
    line.on_log(None, state, None, entry)
    assert capsys.readouterr().out == (
        "step 0/8 · evaluation · loss 2.000 · perplexity 7.39 · token accuracy 61.2% · took 35 s\n"
    )
    line.on_log(None, state, None, {"train_runtime": 5.0, "train_loss": 1.0})
    state.is_world_process_zero = False
    line.on_log(None, state, None, dict(ENTRY))
    assert capsys.readouterr().out == ""


def test_each_evaluation_says_once_that_it_has_begun(capsys: pytest.CaptureFixture[str]) -> None:
    line, state = LogLine(), TrainerState(global_step=2, max_steps=8, is_world_process_zero=True)
    for _ in range(2):
        for _ in range(3):
            line.on_prediction_step(None, state, None, eval_dataloader=[1] * 1234)
        line.on_evaluate(None, state, None)
    assert capsys.readouterr().out == 2 * "step 2/8 · evaluating 1,234 batches\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3569, "59 min"),
        (3571, "1 h 0 min"),
        (4320, "1 h 12 min"),
        (86399, "1 d 0 h"),
        (187200, "2 d 4 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_lines_that_the_docs_show_have_the_form_of_a_runs() -> None:
    lines = (REPO / "docs/launch.md").read_text().splitlines()
    shown = [line for line in lines if line.startswith("step ")]
    assert shown and all(LOGGED_STEP.match(line) for line in shown)
