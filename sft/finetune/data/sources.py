"""The files, folders, URLs and hub datasets that conversations are read from, row by row.

A source is `NAME`, and several are separated by commas. `NAME*2` is read twice in an epoch, and of
`NAME*0.5` a random half is read. NAME is one of

    a path or an fsspec URL (s3://, gs://, https://), which may be a pattern with `*` in it
    a dataset on the hub, `owner/name`, with its config and split if needed:
    `owner/name:config@split`
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from typing import IO, Any

import fsspec
import pyarrow.parquet as pq
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from finetune.data.checks import Row
from finetune.errors import UserError

FORMATS = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
# Longer than any conversation. A file without line feeds reaches it, and is not read into memory.
MAX_LINE_BYTES = 64 * 2**20
HUB_NAME = re.compile(
    r"(?P<path>[\w.-]+(/[\w.-]+)?)(:(?P<name>[\w.-]+))?(@(?P<split>[\w.\[\]:%+-]+))?"
)


@dataclass(frozen=True)
class Source:
    """One NAME of --dataset_name. weight: how often an epoch reads it."""

    name: str
    weight: float = 1.0


def parse_sources(text: str) -> list[Source]:
    """The sources that --dataset_name lists. Raises UserError for a bad weight."""
    sources = []
    for part in filter(None, map(str.strip, text.split(","))):
        name, star, weight = part.rpartition("*")
        # The last star may belong to a pattern instead of a weight: data/*.jsonl or data/*
        is_pattern = not format_of(name) and (format_of(part) or not weight)
        if not star or is_pattern:
            sources.append(Source(part))
            continue
        try:
            sources.append(Source(name.strip(), float(weight)))
        except ValueError:
            raise UserError(
                f"dataset {part!r}: {weight!r} is not a weight; write it like 'a.jsonl*2'"
            ) from None
        if not 0 < sources[-1].weight < 1000:
            raise UserError(f"dataset {part!r}: a weight must be more than 0 and less than 1000")
    return sources


def is_file(name: str) -> bool:
    """Whether NAME is a path or a URL, and not the name of a hub dataset."""
    looks_like_file = (
        "://" in name or "*" in name or name.startswith((".", "/", "~")) or format_of(name)
    )
    return bool(looks_like_file) or fsspec.filesystem("file").exists(name)


def format_of(name: str) -> str | None:
    """The ending in FORMATS that a name has before its compression; None if it has none."""
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((ending for ending in FORMATS if name.endswith(ending)), None)


def find_files(name: str) -> list[tuple[str, str]]:
    """(URL, key) of a file, of every file in a folder, or of every file that matches a pattern.

    The key changes whenever the content of the file does. Raises UserError if there is no file.
    """
    try:
        filesystem, path = fsspec.url_to_fs(name)
        if "*" in path:
            found = sorted(file for file in filesystem.glob(path) if format_of(file))
        elif filesystem.isdir(path):
            found = sorted(file for file in filesystem.find(path) if format_of(file))
        else:
            found = [path] if filesystem.exists(path) else []
        files = [(filesystem.unstrip_protocol(file), filesystem.ukey(file)) for file in found]
    except Exception as error:  # each remote file system raises exceptions of its own
        raise UserError(
            f"dataset {name!r} cannot be read: {type(error).__name__}: {error}"
        ) from error
    if not files and filesystem.isdir(path):
        raise UserError(f"folder {name!r} holds no file that ends in {', '.join(FORMATS)}")
    if not files:
        raise UserError(
            f"dataset {name!r} does not exist: set DATASET to a file, a folder or a hub name"
        )
    return files


def read_hub(name: str, *, config: str | None, split: str) -> Dataset:
    """A hub dataset. The name's own config and split win. Raises UserError if it cannot be read."""
    match = HUB_NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"dataset {name!r} is neither a file nor a hub name like owner/name:config@split"
        )
    try:
        return load_dataset(match["path"], match["name"] or config, split=match["split"] or split)
    except (OSError, ValueError, DatasetGenerationError) as error:
        lines = [line for line in str(error.__cause__ or error).splitlines() if line]
        reason = lines[0] if lines else ""
        raise UserError(
            f"dataset {name!r} cannot be read: there is no such file, and it could not be loaded "
            f"from the hub (is the hub reachable?): {type(error).__name__}: {reason}"
        ) from error


def read_file(url: str) -> Iterator[tuple[int, Row | str]]:
    """Yield (line, row) for every row of a file, in order.

    Where a line holds no row, a string that says what is wrong takes the place of the row. Lines
    count from 1; in Parquet and in a JSON array the number is that of the row.
    """
    with fsspec.open(url, "rb", compression="infer") as stream:
        match format_of(url):
            case ".parquet":
                yield from parquet_rows(stream)
            case ".csv" | ".tsv" as ending:
                yield from csv_rows(stream, delimiter="," if ending == ".csv" else "\t")
            case ".json":
                yield from json_rows(stream)
            case _:
                yield from jsonl_rows(stream)


def jsonl_rows(stream: IO[bytes]) -> Iterator[tuple[int, Row | str]]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):  # skip the rest of the line
                line = stream.readline(MAX_LINE_BYTES)
            yield number, f"longer than {MAX_LINE_BYTES // 2**20} MiB: one conversation a line"
        elif line.strip():
            yield number, parse_object(line.rstrip(b"\r\n"))


def json_rows(stream: IO[bytes]) -> Iterator[tuple[int, Row | str]]:
    """The rows of an array of objects, of one object, or of JSON lines in a file named .json."""
    first_line = stream.readline(MAX_LINE_BYTES)
    is_jsonl = isinstance(parse_object(first_line), dict)
    stream.seek(0)
    if is_jsonl:
        yield from jsonl_rows(stream)
        return
    value = parse_json(stream.read())
    if isinstance(value, str):
        yield 1, value
        return
    for number, row in enumerate(value if isinstance(value, list) else [value], start=1):
        yield number, row if isinstance(row, dict) else f"a {type(row).__name__}, not an object"


def csv_rows(stream: IO[bytes], *, delimiter: str) -> Iterator[tuple[int, Row | str]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    # surrogateescape, so that a byte that is not UTF-8 spoils its own row and not the whole file.
    text = TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.DictReader(text, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                yield reader.line_num, "more or fewer fields than the first line has columns"
            elif not is_unicode("".join(row.values())):
                yield reader.line_num, "not UTF-8"
            else:
                yield reader.line_num, {name: value or None for name, value in row.items()}
    except csv.Error as error:
        yield reader.line_num, f"not CSV ({error})"


def is_unicode(text: str) -> bool:
    """Whether a text is free of the lone surrogates that surrogateescape puts for bad bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parquet_rows(stream: IO[bytes]) -> Iterator[tuple[int, Row | str]]:
    number = 0
    for batch in pq.ParquetFile(stream).iter_batches(batch_size=1000):
        for row in batch.to_pylist():
            number += 1
            yield number, without_nulls(row)


def without_nulls(value: Any) -> Any:
    """Remove null keys at every level. Arrow gives each object the keys of all others, as nulls."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def parse_object(line: bytes) -> Row | str:
    """The object in a line of JSON, or what is wrong with the line."""
    value = parse_json(line)
    if isinstance(value, str | dict):
        return value
    return f"a {type(value).__name__}, not an object"


def parse_json(text: bytes) -> Any:
    """The value in a JSON text. A returned string always says what is wrong: no row is a string."""
    try:
        value = json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start})"
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        return "not JSON that can be read: nested too deep"
    except ValueError as error:
        return str(error)
    return f"the text {value[:20]!r}, not an object" if isinstance(value, str) else value


def unique_keys(pairs: list[tuple[str, Any]]) -> Row:
    """An object's keys and values. Raises ValueError for a key that appears twice.

    json would keep the last of them without a word, and so lose what a user wrote.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return row
