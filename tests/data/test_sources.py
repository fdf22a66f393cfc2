"""Files of every format, compressed or not, local or remote, are read row by row."""

import bz2
import functools
import gzip
import http.server
import json
import lzma
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune.data import sources
from finetune.data.sources import Source, find_files, is_file, parse_sources, read_file
from finetune.errors import UserError
from helpers.paths import REPO

ROW = {"prompt": "2+2?", "completion": "4"}
LINE = json.dumps(ROW).encode()


def test_sources_are_parsed_with_their_weights() -> None:
    assert parse_sources("a.jsonl*2, s3://b/c.parquet ,org/name:de@train[:9]*0.5") == [
        Source("a.jsonl", 2.0),
        Source("s3://b/c.parquet"),
        Source("org/name:de@train[:9]", 0.5),
    ]
    for wrong in ("a.jsonl*much", "a.jsonl*0", "a.jsonl*-1"):
        with pytest.raises(UserError, match="weight"):
            parse_sources(wrong)


def test_files_are_distinguished_from_hub_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("a.jsonl.gz", "./a", "https://example.com/a", "s3://b/c", "folder", "x/y.csv"):
        assert is_file(name)
    assert not is_file("owner/name") and not is_file("owner/name:de@train")


FORMATS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda file: file.write_bytes(LINE + b"\n\n" + LINE),
    "bom.jsonl": lambda file: file.write_bytes(b"\xef\xbb\xbf" + LINE + b"\r\n" + LINE),
    "rows.jsonl.gz": lambda file: file.write_bytes(gzip.compress(LINE + b"\n" + LINE)),
    "rows.jsonl.bz2": lambda file: file.write_bytes(bz2.compress(LINE + b"\n" + LINE)),
    "rows.jsonl.xz": lambda file: file.write_bytes(lzma.compress(LINE + b"\n" + LINE)),
    "array.json": lambda file: file.write_text(json.dumps([ROW, ROW], indent=2)),
    "lines.json": lambda file: file.write_bytes(LINE + b"\n" + LINE),
    "rows.csv": lambda file: file.write_text("prompt,completion\n2+2?,4\n2+2?,4\n"),
    "rows.tsv": lambda file: file.write_text("prompt\tcompletion\n2+2?\t4\n2+2?\t4\n"),
    "rows.parquet": lambda file: pq.write_table(pa.Table.from_pylist([ROW, ROW]), file),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    FORMATS[name](file)
    assert [row for _, row in read_file(str(file))] == [ROW, ROW]


def test_a_folder_gives_all_files_of_a_known_format(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.csv"):
        FORMATS[name](tmp_path / name)
    (tmp_path / "README.md").write_text("not data")
    names = [Path(url).name for url, _ in find_files(str(tmp_path))]
    assert names == ["rows.csv", "rows.jsonl"]


def test_a_pattern_gives_the_files_that_match(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.csv"):
        FORMATS[name](tmp_path / name)
    for pattern, names in {
        "*.jsonl": ["rows.jsonl"],
        "*.jsonl*2": ["rows.jsonl"],
        "ro*.jsonl.gz": ["rows.jsonl.gz"],
        "*": ["rows.csv", "rows.jsonl", "rows.jsonl.gz"],
    }.items():
        (source,) = parse_sources(f"{tmp_path}/{pattern}")
        assert source.weight == (2 if pattern.endswith("2") else 1)
        assert is_file(source.name)
        assert [Path(url).name for url, _ in find_files(source.name)] == names
    with pytest.raises(UserError, match="does not exist"):
        find_files(f"{tmp_path}/*.parquet")


def test_the_key_of_a_file_changes_with_its_content(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(LINE)
    ((_, before),) = find_files(str(file))
    file.write_bytes(LINE + b"\n" + LINE)
    ((_, after),) = find_files(str(file))
    assert before != after


def test_a_file_is_read_over_http(tmp_path: Path) -> None:
    FORMATS["rows.jsonl.gz"](tmp_path / "rows.jsonl.gz")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/rows.jsonl.gz"
        ((found, _),) = find_files(url)
        assert [row for _, row in read_file(found)] == [ROW, ROW]
        with pytest.raises(UserError, match="does not exist"):
            find_files(url + "x")
        server.shutdown()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a bucket on a local S3 server (moto)."""
    server = REPO / ".venv/sky/bin/moto_server"
    if not server.exists():
        pytest.skip("no moto_server: make sky")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    for name, value in {
        "ENDPOINT_URL": endpoint,
        "ACCESS_KEY_ID": "x",
        "SECRET_ACCESS_KEY": "x",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    with subprocess.Popen([server, "-p", str(port)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("Running on" in line for line in process.stderr)
        fsspec.filesystem("s3").mkdir("data")
        yield "s3://data"
        process.kill()


def test_a_folder_is_read_from_a_bucket(s3: str, tmp_path: Path) -> None:
    for name in ("rows.jsonl.gz", "rows.parquet"):
        FORMATS[name](tmp_path / name)
        fsspec.filesystem("s3").put(str(tmp_path / name), f"{s3}/folder/{name}")
    files = find_files(f"{s3}/folder")
    assert [url for url, _ in files] == [f"{s3}/folder/rows.jsonl.gz", f"{s3}/folder/rows.parquet"]
    assert [row for url, _ in files for _, row in read_file(url)] == [ROW] * 4
    with pytest.raises(UserError, match="does not exist"):
        find_files(f"{s3}/missing.jsonl")


def test_rows_are_numbered_by_line_and_blank_lines_count(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([LINE, b"", b"{broken", LINE]))
    assert [number for number, _ in read_file(str(file))] == [1, 3, 4]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"messages": [', "not JSON (Expecting value at column 15)"),
        (b"\xff\xfe{}", "not UTF-8 (byte 0)"),
        (b"[1]", "a list, not an object"),
        (b'"hello"', "the text 'hello', not an object"),
        (b"null", "a NoneType, not an object"),
        (b'{"a": {"role": 1, "role": 2}}', "the key 'role' appears twice in one object"),
        (b"[" * 100_000, "nested too deep"),
    ],
)
def test_a_line_that_holds_no_row_is_described_and_skipped(
    line: bytes, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(LINE + b"\n" + line + b"\n" + LINE)
    (_, first), (number, description), (_, last) = read_file(str(file))
    assert first == last == ROW and number == 2
    assert problem in str(description)


def test_a_line_over_64_mib_is_described_and_skipped(tmp_path: Path) -> None:
    """Such a line is read in pieces, because a line of gigabytes would fill the memory."""
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as stream:
        stream.write(LINE + b"\n")
        stream.truncate(3 * sources.MAX_LINE_BYTES)
        stream.seek(0, 2)
        stream.write(b"\n" + LINE)
    (_, first), (number, description), (_, last) = read_file(str(file))
    assert first == last == ROW and number == 2
    assert "longer than 64 MiB" in str(description)


def test_bad_lines_of_csv_are_described(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"prompt,completion\n2+2?,4\n2+2?\n2+2?,4,5\n\xff,4\n")
    problems = {number: row for number, row in read_file(str(file)) if isinstance(row, str)}
    fields = "more or fewer fields than the first line has columns"
    assert problems == {3: fields, 4: fields, 5: "not UTF-8"}


def test_a_source_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_files(str(tmp_path / "missing.jsonl"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"holds no file that ends in \.jsonl"):
        find_files(str(tmp_path / "folder"))
    with pytest.raises(UserError, match="cannot be read"):
        find_files("nowhere://bucket/a.jsonl")
