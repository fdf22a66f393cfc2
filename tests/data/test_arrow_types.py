"""Arrow's types are decoded to what a JSONL file of the same data would hold."""

import json
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, List, Value

from finetune.data.arrow_types import rows_of_table
from finetune.data.dataset import load_conversations
from helpers.rows import ASSISTANT, USER, write_rows

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "D.",
            "parameters": {"type": "object", "properties": {argument: {"type": "string"}}},
        },
    }
    for name, argument in (("weather", "city"), ("search", "query"))
]
ROWS = [{"messages": [USER, ASSISTANT], "tools": [tool]} for tool in TOOLS]
MAP_OF_TEXTS = pa.map_(pa.string(), pa.map_(pa.string(), pa.string()))


def with_maps() -> pa.Table:
    """ROWS as Spark and DuckDB keep free keys: in columns of the type MAP."""
    parameters = pa.struct([("type", pa.string()), ("properties", MAP_OF_TEXTS)])
    function = [("name", pa.string()), ("description", pa.string()), ("parameters", parameters)]
    tools = pa.list_(pa.struct([("type", pa.string()), ("function", pa.struct(function))]))
    return pa.table(
        {
            "messages": [row["messages"] for row in ROWS],
            "tools": pa.array([row["tools"] for row in ROWS], tools),
        }
    )


def with_json() -> pa.Table:
    """ROWS as datasets 5 writes them when asked for its JSON type."""
    features = Features({"messages": List(Json()), "tools": List(Json())})
    return Dataset.from_list(ROWS, features=features).data.table


def with_structs() -> pa.Table:
    """ROWS as Arrow itself does it: each object has the keys of all others."""
    return pa.Table.from_pylist(ROWS)


def with_structs_of_nulls() -> pa.Table:
    """ROWS as by a writer whose structs cannot be null themselves, like older polars."""
    rows = json.loads(json.dumps(ROWS))
    for row, other in ((rows[0], "query"), (rows[1], "city")):
        row["tools"][0]["function"]["parameters"]["properties"][other] = {"type": None}
    return pa.Table.from_pylist(rows)


WRITERS = [with_maps, with_json, with_structs, with_structs_of_nulls]


@pytest.mark.parametrize("write", WRITERS)
def test_a_table_of_any_types_gives_the_rows_of_jsonl(write: Callable[[], pa.Table]) -> None:
    assert list(rows_of_table(write())) == ROWS


def test_a_parquet_file_gives_the_conversations_of_jsonl(tmp_path: Path) -> None:
    """Equal conversations are rendered to equal tokens."""
    write_rows(tmp_path / "rows.jsonl", *ROWS)
    expected = load_conversations(str(tmp_path / "rows.jsonl"))[:]
    for write in WRITERS:
        file = tmp_path / f"{write.__name__}.parquet"
        pq.write_table(write(), file)
        assert load_conversations(str(file))[:] == expected, write.__name__


def test_types_that_json_does_not_have_become_those_of_an_export() -> None:
    table = pa.table(
        {
            "text": pa.array([b"2+2?"]),
            "bytes": pa.array([b"\xff"]),
            "day": [date(2026, 1, 2)],
            "whole": [Decimal("2.00")],
            "part": [Decimal("2.50")],
            "label": pa.array(["a"]).dictionary_encode(),
            "view": pa.array(["b"], pa.string_view()),
            "none": [None],
        }
    )
    assert list(rows_of_table(table)) == [
        {
            "text": "2+2?",
            "bytes": b"\xff",
            "day": "2026-01-02",
            "whole": 2,
            "part": 2.5,
            "label": "a",
            "view": "b",
        }
    ]


def test_nulls_that_were_written_stay(tmp_path: Path) -> None:
    table = pa.table(
        {
            "json": pa.array(['{"a": null}'], pa.json_()),
            "map": pa.array([[("a", None)]], pa.map_(pa.string(), pa.int64())),
            "list": [[{"a": 1}, None]],
        }
    )
    (row,) = rows_of_table(table)
    assert row == {"json": {"a": None}, "map": {"a": None}, "list": [{"a": 1}, None]}


def test_a_table_of_values_is_one_of_features() -> None:
    """datasets' own features, with an object in a list in an object."""
    features = Features({"a": {"b": List({"c": Value("string"), "d": Json()})}})
    rows = [{"a": {"b": [{"c": "x", "d": [1, {"e": None}]}]}}]
    assert list(rows_of_table(Dataset.from_list(rows, features=features).data.table)) == rows
