"""The list in --dataset_name is taken apart as it was meant, and hub datasets are read by type."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from finetune.data.files import find_files
from finetune.data.sources import Source, is_file, parse_sources, read_hub, rows_of_hub
from finetune.errors import UserError


def test_sources_are_parsed_with_their_weights() -> None:
    assert parse_sources("a.jsonl*2, s3://b/c.parquet ,org/name:de@train[:9]*0.5") == [
        Source("a.jsonl", 2.0),
        Source("s3://b/c.parquet"),
        Source("org/name:de@train[:9]", 0.5),
    ]
    for wrong in ("a.jsonl*much", "a.jsonl*0", "a.jsonl*-1"):
        with pytest.raises(UserError, match="weight"):
            parse_sources(wrong)


@pytest.mark.parametrize("pattern", ["d/*", "d/*.jsonl", "d/*.zip", "d/part-*", "d/*-b.csv"])
def test_a_star_in_a_pattern_is_no_weight(pattern: str) -> None:
    assert parse_sources(pattern) == [Source(pattern)]
    assert parse_sources(pattern + "*2") == [Source(pattern, 2.0)]


def test_a_comma_in_the_name_of_a_file_does_not_divide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x,y.jsonl", "z.jsonl", "of 1,000/a,b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert parse_sources("z.jsonl,x,y.jsonl*2,of 1,000/*.jsonl") == [
        Source("z.jsonl"),
        Source("x,y.jsonl", 2.0),
        Source("of 1,000/*.jsonl"),
    ]
    for name in ("x", "y.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"may be a file or 'x' and 'y.jsonl': rename it"):
        parse_sources("x,y.jsonl")


def test_a_comma_in_a_query_does_not_divide_the_url() -> None:
    url = "https://h.org/a.jsonl?columns=a,b=1&sig=5ECRET"
    assert parse_sources(f"{url}*2,x.jsonl,{url},s3://b/c.csv,{url},owner/name:de") == [
        Source(url, 2.0),
        Source("x.jsonl"),
        Source(url),
        Source("s3://b/c.csv"),
        Source(url),
        Source("owner/name:de"),
    ]
    with pytest.raises(UserError, match="of the query as %2C") as error:
        parse_sources("https://h.org/a?sig=5ECRET,5ECRET")
    assert "5ECRET" not in str(error.value)
    assert parse_sources("imdb,https://h.org/a?x=1") == [
        Source("imdb"),
        Source("https://h.org/a?x=1"),
    ]


def test_files_are_distinguished_from_hub_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("a.jsonl.gz", "./a", "https://example.com/a", "s3://b/c", "folder", "x/y.csv"):
        assert is_file(name)
    assert is_file("a.ndjson") and is_file("a.zip")
    assert not is_file("owner/name") and not is_file("owner/name:de@train")


def test_a_hub_dataset_gives_the_rows_of_its_parquet_file(tmp_path: Path) -> None:
    """It would give objects the keys of other rows too, as nulls."""
    file = find_files(str(Path(__file__).parent / "cases/F22_struct_of_nulls.parquet")).files[0]
    rows = list(rows_of_hub(Dataset(pq.read_table(file.url))))
    properties = [row["tools"][0]["parameters"]["properties"] for row in rows]
    assert [list(names) for names in properties] == [["city"], ["a"]]
    assert json.loads(json.dumps(rows)) == rows


def test_a_pattern_in_braces_is_told_of() -> None:
    first = parse_sources("folder/{a,b}.*")[0]
    with pytest.raises(UserError, match=r"nor a hub name .*: of patterns, only `\*` is known"):
        read_hub(first.name, config=None, split="train")
