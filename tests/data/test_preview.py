"""preview.py shows conversations and what a task makes of them."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from finetune.data.options import DataArguments
from finetune.errors import UserError
from helpers.paths import CONVERSATIONS, REPO
from helpers.rows import ASSISTANT, ROW, USER, WITHOUT_THINKING, write_rows
from preview import PreviewArguments, main

TASK = "gpt-oss-20b-lora.yaml"
LONG = {"messages": [USER, {**ASSISTANT, "content": "4 " * 9000}]}


@pytest.fixture
def show(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the preview of a dataset in this process; returns what it prints."""

    def run(dataset: Path, data_args: DataArguments | None = None, **options: Any) -> str:
        args = PreviewArguments(dataset=str(dataset), tokenizer=str(tiny_model), **options)
        main(args, data_args or DataArguments(conversation_start_date="2026-01-02"))
        return capsys.readouterr().out

    return run


def task_with(tmp_path: Path, old: str, new: str) -> str:
    """A copy of a task file with one edit, beside a link to sft/ that it needs."""
    text = (REPO / TASK).read_text()
    assert old in text
    (tmp_path / "sft").symlink_to(REPO / "sft")
    (tmp_path / TASK).write_text(text.replace(old, new))
    return str(tmp_path / TASK)


def test_the_preview_shows_conversations_and_a_summary(show: Any) -> None:
    shown = show(CONVERSATIONS, task=str(REPO / TASK), num_examples=2)
    # The first conversation has two turns with thinking, the second has one.
    assert shown.count("<|start|>system<|message|>") == 3
    for label in ("in the loss", "left out (--max_length 4,096)", "packed", "of 8 sequences"):
        assert label in shown
    _, _, verdict = shown.partition(" verdict ")
    assert "Learnt: the thinking, the calls and the answer of every turn" in verdict
    assert "Looks wrong:\n" in verdict and "optimizer steps, and fewer than 20" in verdict


def test_the_batch_size_of_an_edited_task_file_counts(show: Any, tmp_path: Path) -> None:
    task = task_with(tmp_path, 'GLOBAL_BATCH_SIZE: "8"', 'GLOBAL_BATCH_SIZE: "32"')
    assert "of 32 sequences" in show(CONVERSATIONS, task=task)


def test_train_args_in_the_task_file_count(show: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "my.jsonl", ROW, ROW, LONG)
    task = task_with(tmp_path, 'TRAIN_ARGS: ""', 'TRAIN_ARGS: "--max_length 512"')
    shown = show(file, task=task)
    assert "left out (--max_length 512)" in shown and "1 conversations" in shown


def test_train_args_in_the_environment_count(
    show: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "my.jsonl", ROW, ROW, LONG)
    monkeypatch.setenv("TRAIN_ARGS", "--max_length 512 --train_on everything --truncate true")
    shown = show(file, task=str(REPO / TASK))
    assert "left out (--max_length 512)" in shown and "0 conversations" in shown
    assert "100.0%" in shown


def test_a_data_flag_of_the_preview_precedes_the_tasks(
    show: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAIN_ARGS", "--reasoning_effort high")
    task = str(REPO / TASK)
    assert "Reasoning: high" in show(CONVERSATIONS, task=task)
    assert "Reasoning: low" in show(CONVERSATIONS, DataArguments(reasoning_effort="low"), task=task)


def test_a_task_that_leaves_out_everything_is_an_error(
    show: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAIN_ARGS", "--max_length 512")
    with pytest.raises(UserError, match="nothing is left to train on"):
        show(write_rows(tmp_path / "my.jsonl", LONG), task=str(REPO / TASK))


def test_it_says_in_words_what_is_not_learnt_and_how_many_samples_there_are(
    show: Any, tmp_path: Path
) -> None:
    two = {"messages": [USER, ASSISTANT, USER, ASSISTANT]}
    file = write_rows(tmp_path / "my.jsonl", two, {"messages": [USER, WITHOUT_THINKING]})
    shown = show(file, num_examples=1)
    assert shown.count("<|start|>system<|message|>") == 2
    assert "1, sample 1 of 2: " in shown and "1, sample 2 of 2: " in shown
    assert "tokens more" in shown
    assert "Not learnt: whether to think, in 1 messages of turns that show no thinking." in shown
    learning = DataArguments(conversation_start_date="2026-01-02", learn_no_thinking=True)
    assert "whether to think" not in show(file, learning)
    whole = DataArguments(conversation_start_date="2026-01-02", learn_past_thinking=False)
    shown = show(file, whole)
    assert "tokens more" not in shown and "the thinking of earlier turns" in shown


def test_bad_rows_that_are_skipped_are_named_in_the_verdict(show: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "my.jsonl", ROW, {"messages": 7}, ROW)
    skipping = DataArguments(conversation_start_date="2026-01-02", skip_bad_rows=True)
    _, _, verdict = show(file, skipping).partition(" verdict ")
    assert f"Left out: 1 of 3 rows of {file} are bad, such as {file}:2: messages is" in verdict


def test_json_prints_every_conversation_and_nothing_else(show: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "my.jsonl", ROW, LONG, ROW)
    rows = [json.loads(line) for line in show(file, json=True, num_examples=1).splitlines()]
    assert len(rows) == 3 and rows[0] == rows[2]
    assert all(row.keys() == {"input_ids", "labels"} for row in rows)
    assert len(rows[1]["input_ids"]) == len(rows[1]["labels"]) > 9000


def test_svg_saves_the_conversations_in_two_colours(show: Any, tmp_path: Path) -> None:
    picture = tmp_path / "preview.svg"
    show(write_rows(tmp_path / "my.jsonl", ROW), svg=str(picture))
    lines = list(ET.parse(picture).iter("{http://www.w3.org/2000/svg}text"))
    text_of_style: dict[str | None, str] = {}
    for line in lines:
        text = "".join(line.itertext()).replace("\xa0", " ")
        assert len(text) <= 100
        style = line.get("class")
        text_of_style[style] = text_of_style.get(style, "") + text
    (in_loss,) = [text for text in text_of_style.values() if "<|message|>Easy.<|end|>" in text]
    (not_in_loss,) = [text for text in text_of_style.values() if "Current date" in text]
    assert in_loss != not_in_loss


def test_an_svg_that_cannot_be_written_is_an_error(show: Any, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "my.jsonl", ROW)
    with pytest.raises(UserError, match="cannot be written: No such file"):
        show(file, svg=str(tmp_path / "missing/preview.svg"))


@pytest.mark.slow
def test_a_bad_file_is_one_error_and_no_traceback(tmp_path: Path, tiny_model: Path) -> None:
    file = write_rows(tmp_path / "my.jsonl", {"messages": [USER]})
    flags = ["--dataset", str(file), "--tokenizer", str(tiny_model)]
    command = [sys.executable, str(REPO / "sft/preview.py"), *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert (
        f"error: dataset {str(file)!r} has 1 problem:\n  {file}:1: there is no assistant"
    ) in result.stderr
