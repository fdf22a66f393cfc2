"""What a person reads at the end of a run."""

import math

import pytest

from finetune.summary import as_text, evaluations, perplexity, print_summary, printable

ENTRIES = [
    {"step": 0, "eval_loss": 2.0, "eval_mean_token_accuracy": 0.25},
    {"step": 2, "loss": 1.5},
    {"step": 4, "eval_loss": 1.0, "eval_mean_token_accuracy": 0.5},
]


def test_the_first_and_the_last_evaluation_are_reported() -> None:
    assert evaluations(ENTRIES) == {
        "eval_loss": [2.0, 1.0],
        "eval_perplexity": [7.3891, 2.7183],
        "eval_token_accuracy": [0.25, 0.5],
    }


def test_without_an_evaluation_at_step_0_there_is_no_value_before() -> None:
    assert evaluations(ENTRIES[1:])["eval_loss"] == [None, 1.0]


def test_without_any_evaluation_nothing_is_reported() -> None:
    assert evaluations(ENTRIES[1:2]) == {}


def test_a_loss_too_large_for_a_float_has_an_infinite_perplexity() -> None:
    assert perplexity(1e4) == math.inf


@pytest.mark.parametrize(
    ("value", "text"),
    [([None, 1.0], "not evaluated -> 1.0"), (1234567, "1,234,567"), (0.5, "0.5")],
)
def test_values_as_a_person_reads_them(value: object, text: str) -> None:
    assert as_text(value) == text


def test_a_long_value_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/checkpoints/" + "a-long-name-of-a-run/" * 8
    print_summary({"final_loss": 1.5, "artifact": path}, title="my run: finished")
    printed = capsys.readouterr().out
    assert "final loss" in printed and "my run: finished" in printed
    cells = "".join(line.split("│")[2].strip() for line in printed.splitlines() if "│" in line)
    assert path in cells


def test_markup_in_titles_and_values_is_printed_as_it_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_summary({"[/b]": "[red]path[/y]"}, title="x[/y]: finished")
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("x[/y]: finished", "[/b]", "[red]path[/y]"))


def test_control_characters_are_written_out_and_text_is_left() -> None:
    assert printable("a\x1b[2J\x9b\r\u202eb\n\tÄ 中 👍") == ("a\\x1b[2J\\x9b\\r\\u202eb\n\tÄ 中 👍")
