"""Datasets read, refused with a line that helps, and tokenised with the right labels."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from conftest import CONVERSATIONS
from data import find_problem, load_conversations, load_data, tokenize
from errors import UserError

USER = {"role": "user", "content": "2+2?"}
ASSISTANT = {"role": "assistant", "thinking": "Easy.", "content": "4"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_shipped_conversations_are_varied() -> None:
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


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"messages": [', "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1]", "a list, not an object"),
        (b'{"text": "hello"}', "no `messages` among the columns text"),
        (b'{"messages": []}', "`messages` is not a list of messages"),
        (b'{"messages": ["hello"]}', "messages[0] is a str"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "the role 'robot'"),
        (b'{"messages": [{"role": "user", "content": 7}]}', "no text in `content`"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "no assistant message"),
    ],
)
def test_a_bad_line_is_described(line: bytes, problem: str) -> None:
    assert problem in str(find_problem(line))


def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    file = write(tmp_path / "my.jsonl", {"messages": [USER, ASSISTANT]})
    file.write_text(file.read_text() + "\n{broken\n")
    with pytest.raises(UserError, match=r"my\.jsonl:3: not JSON"):
        load_conversations(str(file))


def test_sources_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="empty"):
        load_conversations(str(empty))
    with pytest.raises(UserError, match="does not exist"):
        load_conversations(str(tmp_path / "missing.jsonl"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"no \.jsonl file"):
        load_conversations(str(tmp_path / "folder"))


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"messages": [USER, ASSISTANT]})
    write(tmp_path / "b.jsonl", {"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]})
    assert len(load_conversations(str(tmp_path))) == 3


def test_only_the_assistant_is_learnt(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write(tmp_path / "my.jsonl", {"messages": [USER, ASSISTANT]})
    row = load_data(str(source), tokenizer, max_length=1024)[0]
    learnt = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert "Easy." in learnt
    assert learnt.endswith("<|channel|>final<|message|>4<|return|>")
    assert "2+2?" not in learnt
    assert "2+2?" in tokenizer.decode(row["input_ids"])


def test_masked_conversations_are_dropped_or_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    long_question = {"role": "user", "content": "why? " * 400}
    short, long = {"messages": [USER, ASSISTANT]}, {"messages": [long_question, ASSISTANT]}
    mixed = load_conversations(str(write(tmp_path / "mixed.jsonl", short, long)))
    assert len(tokenize(mixed, tokenizer, max_length=512)) == 1
    assert "1 cut at max_length=512, 1 dropped" in capsys.readouterr().out
    masked = load_conversations(str(write(tmp_path / "masked.jsonl", long)))
    with pytest.raises(UserError, match="every label is masked"):
        tokenize(masked, tokenizer, max_length=512)
