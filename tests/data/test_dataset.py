"""Datasets of any kind become tokens with labels; a dataset that cannot be used is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ScriptArguments, SFTConfig, pack_dataset

from finetune.data.dataset import (
    conversations_of,
    count_tokens,
    load_conversations,
    load_datasets,
    mean_length,
    render_all,
    tokenize,
)
from finetune.data.options import DataArguments
from finetune.errors import UserError
from helpers.paths import CONVERSATIONS, REPO, python_path
from helpers.rows import ASSISTANT, ROW, USER, write_rows

DEFAULTS = DataArguments(conversation_start_date="2026-01-02")


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def tokens_of(
    tokenizer: PreTrainedTokenizerBase, file: Path, *, max_length: int | None = 1024, **options: Any
) -> Dataset:
    data_args = replace(DEFAULTS, **options)
    return tokenize(load_conversations(str(file)), tokenizer, data_args, max_length=max_length)


def loss_text(tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def test_the_shipped_conversations_vary_in_language_and_in_turns() -> None:
    rows = [json.loads(line) for line in CONVERSATIONS.read_text().splitlines()]
    assert len(rows) >= 100
    assert len({row["reasoning_language"] for row in rows}) >= 5
    assert sum(len(row["messages"]) > 3 for row in rows) >= 20
    for row in rows:
        assert row["messages"][1]["content"] == row["user"]
        assert row["messages"][2] == {
            "role": "assistant",
            "content": row["final"],
            "thinking": row["analysis"],
        }


def test_labels_are_the_ids_in_the_loss_and_minus_100_elsewhere(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    file = write_rows(tmp_path / "my.jsonl", ROW, {"text": "Once upon a time"})
    rows = list(tokens_of(tiny_tokenizer, file))
    assert [loss_text(tiny_tokenizer, row) for row in rows] == [
        "<|channel|>analysis<|message|>Easy.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|return|>",
        "Once upon a time<|endoftext|>",
    ]
    for row in rows:
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        assert all(label in (-100, number) for number, label in pairs)


def test_the_flags_decide_what_is_in_the_loss(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": "4"}]}
    file = write_rows(tmp_path / "my.jsonl", row)
    (everything,) = tokens_of(tiny_tokenizer, file, train_on="everything")
    assert everything["labels"] == everything["input_ids"]
    (with_header,) = tokens_of(tiny_tokenizer, file, learn_no_thinking=True)
    assert loss_text(tiny_tokenizer, with_header) == "<|channel|>final<|message|>4<|return|>"


def test_a_conversations_own_effort_precedes_the_flag(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    file = write_rows(tmp_path / "my.jsonl", ROW, {**ROW, "reasoning_effort": "low"})
    first, second = tokens_of(tiny_tokenizer, file, reasoning_effort="high")["input_ids"]
    assert "Current date: 2026-01-02\n\nReasoning: high" in tiny_tokenizer.decode(first)
    assert "Reasoning: low" in tiny_tokenizer.decode(second)


def test_over_long_conversations_are_left_out_or_cut(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"messages": [USER, {**ASSISTANT, "content": "4 " * 2000}]}
    file = write_rows(tmp_path / "my.jsonl", ROW, long)
    assert len(tokens_of(tiny_tokenizer, file, max_length=512)) == 1
    assert "1 longer than max_length=512 left out" in capsys.readouterr().out
    _, cut = tokens_of(tiny_tokenizer, file, max_length=512, truncate=True)
    assert len(cut["input_ids"]) == len(cut["labels"]) == 512
    assert "1 longer than max_length=512 cut" in capsys.readouterr().out
    assert len(tokens_of(tiny_tokenizer, file, max_length=None)) == 2


def test_a_dataset_of_over_long_conversations_only_is_refused(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    long = {"messages": [USER, {**ASSISTANT, "content": "4 " * 2000}]}
    file = write_rows(tmp_path / "my.jsonl", long)
    with pytest.raises(UserError, match="nothing is left to train on: of 1 conversations, 1 are"):
        tokens_of(tiny_tokenizer, file, max_length=512)


def test_a_conversation_whose_answer_is_cut_away_is_left_out(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    question = {"role": "user", "content": "why? " * 2000}
    file = write_rows(tmp_path / "my.jsonl", ROW, {"messages": [question, ASSISTANT]})
    assert len(tokens_of(tiny_tokenizer, file, max_length=512, truncate=True)) == 1


def test_a_conversation_with_no_token_in_the_loss_is_left_out(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "my.jsonl", ROW, {"messages": [USER, {**ASSISTANT, "weight": 0}]})
    assert len(tokens_of(tiny_tokenizer, file)) == 1
    assert "1 with no token in the loss left out" in capsys.readouterr().out


def test_an_error_lists_the_first_20_problems_by_line(tmp_path: Path) -> None:
    bad = [{"messages": [{"role": "user", "content": 7}, ASSISTANT]}] * 30
    file = write_rows(tmp_path / "my.jsonl", ROW, *bad)
    with pytest.raises(UserError) as error:
        load_conversations(str(file))
    first, *problems, more, example = str(error.value).splitlines()
    assert first == f"dataset {str(file)!r} has 30 problems:"
    assert problems == [
        f"{file}:{line}: messages[0] has the number 7 as `content`, not text"
        for line in range(2, 22)
    ]
    assert more == "and 10 more"
    assert '{"messages": [{"role": "user", "content": "2+2?"}' in example


def test_a_dataset_that_was_corrected_is_read_again(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "my.jsonl", {"messages": []})
    with pytest.raises(UserError, match=r"my\.jsonl:1: there are no messages in `messages`"):
        load_conversations(str(file))
    write_rows(file, ROW, ROW)
    assert len(load_conversations(str(file))) == 2


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        load_conversations(str(write_rows(tmp_path / "empty.jsonl")))


def test_a_hub_row_loses_the_null_keys_that_arrow_has_added() -> None:
    """In a typed table every tool has the keys of all tools."""
    parameters = [{"type": "object", "required": ["a"]}, {"type": "object", "title": "B"}]
    tools = [{"name": "f", "parameters": schema} for schema in parameters]
    hub = Dataset.from_list([{**ROW, "tools": [tool]} for tool in tools])
    rows = [json.loads(row["conversation"]) for row in conversations_of("org/name", hub=hub)]
    assert [row["tools"][0]["parameters"] for row in rows] == parameters


def test_a_bad_hub_row_is_named_by_its_number() -> None:
    hub = Dataset.from_list([ROW, {"messages": [USER]}])
    with pytest.raises(UserError, match="org/name, row 2: there is no assistant message"):
        list(conversations_of("org/name", hub=hub))


def test_weights_repeat_rows_and_choose_a_share_of_them(tmp_path: Path) -> None:
    numbered = [{"prompt": str(n), "completion": "x"} for n in range(10)]
    a = write_rows(tmp_path / "a.jsonl", *numbered)
    b = write_rows(tmp_path / "b.jsonl", *numbered)
    rows = load_conversations(f"{a}*2.5,{b}*0.3")
    assert len(rows) == 25 + 3
    assert rows["conversation"][:10] == rows["conversation"][10:20]
    assert rows["conversation"] == load_conversations(f"{a}*2.5,{b}*0.3")["conversation"]


def test_a_key_that_is_no_unicode_is_named_and_no_dataset_at_all_is_an_error(
    tmp_path: Path,
) -> None:
    file = tmp_path / "my.jsonl"
    file.write_text(json.dumps({**ROW, "\ud83d": 1}) + "\n")
    assert load_conversations(str(file))[0]["notes"] == ["key `\\ud83d` not read"]
    with pytest.raises(UserError, match="the dataset is empty: set DATASET"):
        load_conversations(" ,")


def test_a_share_is_held_out_for_evaluation(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    training_args = SFTConfig(
        output_dir=str(tmp_path), eval_strategy="epoch", max_length=None, use_cpu=True
    )
    script_args = ScriptArguments(dataset_name=str(CONVERSATIONS))
    data_args = replace(DEFAULTS, test_split_size=0.2)
    train, test = load_datasets(script_args, training_args, data_args, tiny_tokenizer)
    assert test is not None
    # Samples of one conversation begin alike, up to the first question: none is in both parts.
    beginnings = [
        {tiny_tokenizer.decode(row).split("<|start|>assistant")[0] for row in part["input_ids"]}
        for part in (train, test)
    ]
    assert len(beginnings[1]) == 22 < len(test) and not beginnings[0] & beginnings[1]
    with pytest.raises(UserError, match="--test_split_size"):
        load_datasets(script_args, training_args, DEFAULTS, tiny_tokenizer)


def test_conversations_become_samples_and_the_log_counts_the_extra_tokens(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "my.jsonl", ROW, {"messages": [*ROW["messages"], USER, ASSISTANT]})
    one, first, second = tokens_of(tiny_tokenizer, file)
    assert one == first  # the first turn is learnt just as if the conversation ended with it
    assert loss_text(tiny_tokenizer, second) == loss_text(tiny_tokenizer, one)
    extra = len(first["input_ids"])
    learnt = f"3 samples, so that the thinking of every turn is learnt: {extra} tokens more"
    assert learnt in capsys.readouterr().out
    assert len(tokens_of(tiny_tokenizer, file, learn_past_thinking=False)) == 2
    assert "samples" not in capsys.readouterr().out
    render = partial(render_all, load_conversations(str(file)), tiny_tokenizer)
    assert render(DEFAULTS)["num_choices_left_out"] == [0, 0, 0]
    today = replace(DEFAULTS, learn_past_thinking=False)
    assert render(today)["num_choices_left_out"] == [0, 1]


def test_packing_fills_97_percent_at_the_shipped_lengths(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """The rows are repeated because the last sequence of a small dataset is nearly empty."""
    rows = tokens_of(tiny_tokenizer, Path(f"{CONVERSATIONS}*20"), max_length=4096)
    packed = pack_dataset(rows, 4096, "bfd")
    assert count_tokens(rows) / (len(packed) * 4096) >= 0.97


def test_mean_length_counts_the_tokens_of_the_selected_rows() -> None:
    rows = Dataset.from_dict({"input_ids": [[1] * n for n in range(5000)], "labels": [[]] * 5000})
    assert mean_length(rows) == 4999 / 2
    assert mean_length(rows.select([10, 4999, 4000])) == 9009 / 3


@pytest.mark.slow
def test_a_converter_that_changes_is_not_served_the_cache_of_the_old_one(tmp_path: Path) -> None:
    code = tmp_path / "sft"
    shutil.copytree(REPO / "sft/finetune", code / "finetune")
    file = write_rows(tmp_path / "my.jsonl", {"prompt": "2+2?", "completion": "4"})
    script = "import sys; from finetune.data.dataset import load_conversations as load\n"
    script += "print(load(sys.argv[1])[0]['shape'])"

    def shape() -> str:
        envs = os.environ | {
            "PYTHONPATH": python_path(str(code)),
            "HF_HOME": str(tmp_path / "cache"),
        }
        command = [sys.executable, "-c", script, str(file)]
        return subprocess.run(command, env=envs, capture_output=True, text=True).stdout.strip()

    assert shape() == "prompt and completion"
    for module in (code / "finetune/data").glob("*.py"):
        module.write_text(module.read_text().replace('"prompt and completion"', '"question"'))
    assert shape() == "question"


def test_bad_rows_are_left_out_and_named_with_skip_bad_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "my.jsonl", ROW, {"messages": 7}, ROW)
    for _ in range(2):  # the second time from the cache
        rows = load_conversations(str(file), skip_bad_rows=True)
        assert len(rows) == 2 and None not in rows["conversation"]
        printed = capsys.readouterr().out
        assert "1 bad rows left out" in printed and f"{file}:2: messages is the number 7" in printed
    with pytest.raises(UserError, match="messages is the number 7, not an object"):
        load_conversations(str(file))
