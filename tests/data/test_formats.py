"""Files of every format, compressed or not, on disk or on a server, are read row by row."""

import bz2
import functools
import gzip
import http.server
import json
import lzma
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import zstandard
from gcp_storage_emulator.server import create_server

from finetune.data.files import find_files
from finetune.data.formats import read_file
from finetune.data.json_rows import MAX_LINE_BYTES
from finetune.errors import UserError
from helpers.paths import REPO, python_path
from rehearse import free_port

ROW = {"prompt": "2+2?", "completion": "4"}
LINE = json.dumps(ROW).encode()
LINES = LINE + b"\n" + LINE
TABLE = pa.Table.from_pylist([ROW, ROW])


def write_zip(file: Path, **members: bytes) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)


def write_stream(file: Path) -> None:
    with pa.ipc.new_stream(file, TABLE.schema) as writer:
        writer.write_table(TABLE)


def parquet_bytes() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink)
    return sink.getvalue().to_pybytes()


FILES: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda file: file.write_bytes(LINE + b"\n\n" + LINE),
    "rows.ndjson": lambda file: file.write_bytes(LINES),
    "ROWS.JSONL": lambda file: file.write_bytes(LINES),
    "bom.jsonl": lambda file: file.write_bytes(b"\xef\xbb\xbf" + LINE + b"\r\n" + LINE),
    "rows.jsonl.gz": lambda file: file.write_bytes(gzip.compress(LINES)),
    "two.jsonl.gz": lambda file: file.write_bytes(gzip.compress(LINE + b"\n") * 2),
    "rows.jsonl.bz2": lambda file: file.write_bytes(bz2.compress(LINES)),
    "rows.jsonl.xz": lambda file: file.write_bytes(lzma.compress(LINES)),
    "rows.jsonl.zst": lambda file: file.write_bytes(zstandard.compress(LINES)),
    "two.jsonl.zst": lambda file: file.write_bytes(zstandard.compress(LINE + b"\n") * 2),
    "array.json.zst": lambda file: file.write_bytes(zstandard.compress(b"[%b,%b]" % (LINE, LINE))),
    "rows.jsonl.zip": lambda file: write_zip(file, rows=LINES),
    "two.zip": lambda file: write_zip(file, a__jsonl=LINE, b__json__gz=gzip.compress(LINE)),
    "parquet.zip": lambda file: write_zip(file, a__parquet=parquet_bytes()),
    "array.json": lambda file: file.write_text(json.dumps([ROW, ROW], indent=2)),
    "array.json.gz": lambda file: file.write_bytes(gzip.compress(b"[%b,%b]" % (LINE, LINE))),
    "lines.json": lambda file: file.write_bytes(LINES),
    "no_ending": lambda file: file.write_bytes(LINES),
    "rows.csv": lambda file: file.write_text("prompt,completion\n2+2?,4\n2+2?,4\n"),
    "rows.tsv": lambda file: file.write_text("prompt\tcompletion\n2+2?\t4\n2+2?\t4\n"),
    "rows.parquet": lambda file: file.write_bytes(parquet_bytes()),
    "rows.parquet.gz": lambda file: file.write_bytes(gzip.compress(parquet_bytes())),
    "rows.arrow": write_stream,
    "rows.feather": lambda file: feather.write_feather(TABLE, str(file)),
}


def rows_of(name: str) -> list[Any]:
    return [row for file in find_files(name).files for _, row in read_file(file)]


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    FILES[name](tmp_path / name)
    assert rows_of(str(tmp_path / name)) == [ROW, ROW]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Answers neither HEAD nor a part of a file, as servers of signed URLs do."""

    def do_HEAD(self) -> None:
        self.send_error(403)

    def do_GET(self) -> None:
        if "expired" in self.path:
            self.send_error(403)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, so that a file is fetched."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path: Path, cache: Path) -> Iterator[str]:
    """The URL of a web server with every file of FILES."""
    for name, write in FILES.items():
        write(tmp_path / name)
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_format_is_read_over_http(server: str) -> None:
    for name in FILES:
        for query in ("", "?X-Amz-Signature=ab%2Fc&X-Amz-Date=2026"):
            assert rows_of(f"{server}/{name}{query}") == [ROW, ROW], name
    with pytest.raises(UserError, match="does not exist"):
        find_files(f"{server}/rows.jsonlx")
    with pytest.raises(UserError, match="the server answers 403"):
        find_files(f"{server}/rows.jsonl?expired")


def test_a_file_that_changes_on_a_server_is_fetched_again(server: str, tmp_path: Path) -> None:
    assert len(rows_of(f"{server}/rows.ndjson")) == 2
    (tmp_path / "rows.ndjson").write_bytes(LINE)
    assert len(rows_of(f"{server}/rows.ndjson")) == 1


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[str]:
    """The URL of a bucket on a local S3 server (moto)."""
    server = REPO / ".venv/sky/bin/moto_server"
    if not server.exists():
        pytest.skip("no moto_server: make sky")
    port = free_port()
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


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[str]:
    """The URL of a bucket on a local server of Google Cloud Storage (gcp-storage-emulator)."""
    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="data")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield "gs://data"
    server.stop()


@pytest.mark.parametrize("store", ["s3", "gs"])
def test_every_format_is_read_from_a_bucket(
    store: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bucket = request.getfixturevalue(store)
    for name, write in FILES.items():
        write(tmp_path / name)
        fsspec.filesystem(store).put(str(tmp_path / name), f"{bucket}/folder/{name}")
    for name in FILES:
        assert rows_of(f"{bucket}/folder/{name}") == [ROW, ROW], name
    found = find_files(f"{bucket}/folder")
    assert {file.url for file in found.files} == {
        f"{bucket}/folder/{name}" for name in FILES if name != "no_ending"
    }
    assert found.notes == ["not read, of no known format: no_ending"]
    with pytest.raises(UserError, match="does not exist"):
        find_files(f"{bucket}/missing.jsonl")


BAD_FILES = {
    "utf16.jsonl": (LINES.decode().encode("utf-16"), ": UTF-16, UTF-32 or no text at all: save it"),
    "packed.jsonl": (gzip.compress(LINES), ": is packed by gzip: let its name end in .gz"),
    "table.json": (parquet_bytes(), ": is Parquet: let its name end in .parquet"),
    "utf16be.csv": ("prompt,completion\n1,2".encode("utf-16-be"), ": UTF-16, UTF-32 or no text"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-9], " cannot be read after row"),
    "cut.jsonl.zst": (zstandard.compress(LINES)[:-9], " cannot be read after row 0: EOFError"),
    "cut.parquet": (parquet_bytes()[:-9], " cannot be read after row 0: Arrow"),
    "rows.jsonl.xz": (LINES, " cannot be read after row 0: LZMAError"),
    "bad.json": (b"[{},\n{]", ": row 2: not JSON (Expecting property name"),
    "bad.csv": (b'prompt,completion\n1,2\n"3" 4,5\n', ": line 3: not CSV"),
    "rows.xlsx": (b"PK rows", ": ends in none of .jsonl, .ndjson"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_to_its_end_is_named(name: str, tmp_path: Path) -> None:
    content, problem = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        rows_of(str(tmp_path / name))
    assert f"{tmp_path / name}{problem}" in str(error.value)


def test_an_encrypted_archive_is_named(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", a__jsonl=LINE)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.zip is encrypted"):
        rows_of(str(tmp_path / "a.zip"))


def test_names_of_csvs_columns_are_read_without_spaces_and_may_not_repeat(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt, completion\n2+2?,4\n")
    assert rows_of(str(file)) == [ROW]
    file.write_text("prompt,prompt,completion\n1,2+2?,4\n")
    with pytest.raises(UserError, match="the column 'prompt' appears twice"):
        rows_of(str(file))


def test_bad_lines_of_csv_are_described(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"prompt,completion\n2+2?,4\n2+2?\n2+2?,4,5\n\xff,4\n")
    (found,) = find_files(str(file)).files
    problems = {number: row for number, row in read_file(found) if isinstance(row, str)}
    fields = "more or fewer fields than the first line has columns"
    assert problems == {3: fields, 4: fields, 5: "not UTF-8"}


def test_a_line_over_64_mib_is_described_and_skipped(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as stream:
        stream.write(LINE + b"\n{")
        stream.truncate(3 * MAX_LINE_BYTES)
        stream.seek(0, 2)
        stream.write(b"\n" + LINE)
    first, description, last = rows_of(str(file))
    assert first == last == ROW
    assert "longer than 64 MiB" in description


READ_IN_LITTLE_MEMORY = """
import resource, sys
from finetune.data.formats import read_file
from finetune.data.files import find_files
from finetune.errors import UserError
before = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (before + {limit}, before + {limit}))
for name in sys.argv[1:]:
    try:
        print(*[row for file in find_files(name).files for _, row in read_file(file)][:1])
    except UserError as error:
        print(error)
"""
BOMBS = {
    "text.json": (b'[{"a": "', b"a", "longer than 64 MiB or not JSON"),
    "space.json": (b"[", b" ", "row 1: not JSON"),
    "line.jsonl": (b'{"a": "', b"a", "longer than 64 MiB: one conversation a line"),
    "line.csv": (b"prompt,completion\n", b"a", "line 2: not CSV (longer than 64 MiB)"),
}


@pytest.mark.slow
def test_a_bomb_ends_in_one_line_and_bounded_memory(tmp_path: Path) -> None:
    """One gigabyte in a file of some kilobytes, read in less than that."""
    files = [tmp_path / f"{name}.zst" for name in BOMBS]
    for file, (begin, filling, _) in zip(files, BOMBS.values(), strict=True):
        with file.open("wb") as stream, zstandard.ZstdCompressor().stream_writer(stream) as packed:
            packed.write(begin)
            for _ in range(64):
                packed.write(filling * 2**24)
        assert file.stat().st_size < 10**6
    result = subprocess.run(
        [sys.executable, "-c", READ_IN_LITTLE_MEMORY.format(limit=700 * 2**20), *map(str, files)],
        env={"PYTHONPATH": python_path("sft"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    for line, (_, _, problem) in zip(result.stdout.splitlines(), BOMBS.values(), strict=True):
        assert problem in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps([ROW, ROW], indent=2).encode(), "is a JSON array: let its name end in .json"),
        (b"[" + LINE + b",\n" + LINE + b"]", "is a JSON array: let its name end in .json"),
        (json.dumps(ROW, indent=2).encode(), "is JSON of several lines a row: let its name end in"),
    ],
)
def test_json_lines_that_are_none_are_one_problem(
    content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    (file,) = find_files(str(tmp_path / "rows.jsonl")).files
    with pytest.raises(UserError, match=words):
        list(read_file(file))
