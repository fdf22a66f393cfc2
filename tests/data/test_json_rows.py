"""JSON and JSON lines are read a piece at a time, and what is wrong is said with its place."""

import io
import json
from typing import Any

import pytest

from finetune.data import json_rows
from finetune.data.json_rows import jsonl_rows
from finetune.errors import UserError

ROW = {"prompt": "2+2?", "completion": "4"}
LINE = json.dumps(ROW).encode()


def rows_of(text: bytes | str) -> list[tuple[int, Any]]:
    data = text.encode() if isinstance(text, str) else text
    return list(json_rows.json_rows(io.BufferedReader(io.BytesIO(data))))  # type: ignore[type-var]


@pytest.mark.parametrize("size", [1, 2, 7, 2**20])
def test_an_array_is_read_in_pieces_of_any_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "READ_CHARACTERS", size)
    values = [ROW, {"a": [1, {"b": "],}"}]}, {}, {"c": 'ü\\"\n'}]
    for indent in (None, 2):
        text = json.dumps(values, indent=indent, ensure_ascii=False)
        for written in (text, "\ufeff \n" + text + "\n"):
            assert rows_of(written) == list(enumerate(values, start=1))
    assert rows_of("[12, 345]") == [
        (1, "the number 12, not an object"),
        (2, "the number 345, not an object"),
    ]


def test_other_layouts_of_json_are_read() -> None:
    assert rows_of(json.dumps(ROW, indent=2)) == [(1, ROW)]
    assert rows_of(json.dumps(ROW, indent=2) * 2) == [(1, ROW), (2, ROW)]
    assert rows_of(LINE + b"\n\n" + LINE) == [(1, ROW), (3, ROW)]
    assert rows_of("[]") == rows_of("") == rows_of(" \n") == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1},\n {"a": }]', "row 2: not JSON (Expecting value at line 2 column 8)"),
        ('[{"a": 1}\n {"a": 2}]', "row 1: not JSON (Expecting ',' delimiter at line 2 column 2)"),
        ('[{"a": 1}', "row 1: not JSON (Expecting ',' delimiter at line 1 column 10)"),
        ('[{"a": 1}] x', "row 1: not JSON (Extra data at line 1 column 12)"),
        ('[{"a": 1}, ' + "[" * 100_000, "row 2: not JSON that can be read (nested too deep"),
        (b'[{"a": "\xff"}]', "not UTF-8, in row"),
    ],
)
def test_an_array_that_breaks_off_is_refused_in_its_place(text: bytes | str, problem: str) -> None:
    with pytest.raises(UserError) as error:
        rows_of(text)
    assert problem in str(error.value)


def test_a_bad_element_of_an_array_does_not_hide_the_others() -> None:
    array = '[{"a": 1, "a": 2}, 3, "four", {"a": 5}]'
    assert rows_of(array) == [
        (1, "the key 'a' appears twice in one object"),
        (2, "the number 3, not an object"),
        (3, "the text 'four', not an object"),
        (4, {"a": 5}),
    ]


def test_rows_are_numbered_by_line_and_blank_lines_count() -> None:
    stream = io.BytesIO(b"\n".join([LINE, b"", b"{broken", LINE]))
    assert [number for number, _ in jsonl_rows(stream)] == [1, 3, 4]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"messages": [', "not JSON (Expecting value at column 15)"),
        (b"\xff{}", "not UTF-8 (byte 0)"),
        (b'{"a": "\0"}', "not JSON (Invalid control character at at column 8)"),
        (b"[1]", "a list, not an object"),
        (b'"hello"', "the text 'hello', not an object"),
        (b"null", "null, not an object"),
        (b'{"a": {"role": 1, "role": 2}}', "the key 'role' appears twice in one object"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_a_line_that_holds_no_row_is_described_and_skipped(line: bytes, problem: str) -> None:
    stream = io.BytesIO(LINE + b"\n" + line + b"\n" + LINE)
    (_, first), (number, description), (_, last) = jsonl_rows(stream)
    assert first == last == ROW and number == 2
    assert problem in str(description)
