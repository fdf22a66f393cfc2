"""Files of every format, read row by row. What a line cannot give is said in its place."""

import csv
import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO, Any, cast
from zipfile import ZipFile

import pyarrow as pa
import pyarrow.parquet as pq

from finetune.data.arrow_types import rows_of_table
from finetune.data.checks import Row
from finetune.data.compression import DAMAGED, decompress
from finetune.data.files import FORMATS, DataFile, format_of, local_path
from finetune.data.json_rows import MAX_LINE_BYTES, TOO_LONG, json_rows, jsonl_rows
from finetune.data.values import is_unicode
from finetune.errors import UserError

BATCH_ROWS = 1000
UNICODE_MARKS = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16, and the first one of UTF-32 too
# What a file of another kind than its name says begins with.
SIGNATURES = {
    b"\x1f\x8b": "is packed by gzip: let its name end in .gz",
    b"PK\x03\x04": "is a zip archive or Excel: let its name end in .zip, or save it as CSV",
    b"\x28\xb5\x2f\xfd": "is packed by zstd: let its name end in .zst",
    b"BZh": "is packed by bzip2: let its name end in .bz2",
    b"\xfd7zX": "is packed by xz: let its name end in .xz",
    b"PAR1": "is Parquet: let its name end in .parquet",
    b"ARRO": "is Arrow: let its name end in .arrow",
}


def read_file(file: DataFile) -> Iterator[tuple[int, Row | str]]:
    """Yield (line, row) for every row of a file, in order.

    Where a line holds no row, a string that says what is wrong takes the place of the row. Lines
    count from 1; in Parquet, Arrow and a JSON array the number is that of the row. Raises UserError
    if the file cannot be read to its end.
    """
    number = 0
    try:
        with ExitStack() as opened:
            stream: IO[bytes] = opened.enter_context(open(local_path(file), "rb"))
            if file.member is not None:
                archive = opened.enter_context(ZipFile(stream))
                stream = opened.enter_context(archive.open(file.member))
            for number, row in rows_of_stream(stream, file):
                yield number, row
    except UserError as error:
        raise UserError(f"{file.place}: {error}") from error
    except (
        OSError,
        RuntimeError,
        NotImplementedError,
        ValueError,
        pa.ArrowException,
        *DAMAGED,
    ) as error:
        raise UserError(
            f"{file.place} cannot be read after row {number}: {type(error).__name__}: {error}"
        ) from error


def rows_of_stream(stream: IO[bytes], file: DataFile) -> Iterator[tuple[int, Row | str]]:
    """The rows of an opened file. Raises UserError, and whatever a library raises."""
    plain = decompress(stream, file.name)
    text_format = format_of(file.name)
    if text_format in (".parquet", ".arrow"):
        with seekable(plain, is_plain=plain is stream and file.member is None) as table:
            read = parquet_rows if text_format == ".parquet" else arrow_rows
            yield from read(table)
        return
    buffered = io.BufferedReader(cast(Any, plain), buffer_size=2**20)
    start = buffered.peek(4)[:4]
    for signature, what in SIGNATURES.items():
        if start.startswith(signature):
            raise UserError(what)
    if start.startswith(UNICODE_MARKS) or b"\0" in start:
        raise UserError("UTF-16, UTF-32 or no text at all: save it as UTF-8")
    match text_format:
        case ".csv":
            yield from csv_rows(buffered, delimiter=",")
        case ".tsv":
            yield from csv_rows(buffered, delimiter="\t")
        case ".jsonl":
            check_lines(buffered)
            yield from jsonl_rows(buffered)
        case ".json":
            yield from json_rows(buffered)
        case _ if start.lstrip()[:1] in (b"{", b"["):
            yield from json_rows(buffered)
        case _:
            raise UserError(f"ends in none of {', '.join(FORMATS)}, and does not begin like JSON")


def check_lines(stream: io.BufferedReader) -> None:
    """Raise UserError for JSON that is not written a row a line: each line would be a problem."""
    start = stream.peek(1).removeprefix(b"\xef\xbb\xbf").lstrip()
    first_line = start.partition(b"\n")[0].rstrip()
    if first_line == b"[" or (first_line.startswith(b"[") and first_line.endswith(b",")):
        raise UserError("is a JSON array: let its name end in .json")
    if first_line == b"{":
        raise UserError("is JSON of several lines a row: let its name end in .json")


def seekable(stream: IO[bytes], *, is_plain: bool) -> IO[bytes]:
    """A stream to seek in, which unpacked ones are slow at: these go to a file that has no name."""
    if is_plain:
        return stream
    copy = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    shutil.copyfileobj(stream, copy, 2**20)
    copy.seek(0)
    return cast(IO[bytes], copy)


def csv_rows(stream: io.BufferedReader, *, delimiter: str) -> Iterator[tuple[int, Row | str]]:
    csv.field_size_limit(MAX_LINE_BYTES)
    # surrogateescape, so that a byte that is not UTF-8 spoils its own row and not the whole file.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.DictReader(short_lines(text), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in reader.fieldnames or []]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"the column {twice!r} appears twice in the first line")
        reader.fieldnames = names
        for row in reader:
            if None in row or None in row.values():
                yield reader.line_num, "more or fewer fields than the first line has columns"
            elif not is_unicode("".join(row.values())):
                yield reader.line_num, "not UTF-8"
            else:
                yield reader.line_num, {name: value or None for name, value in row.items()}
    except csv.Error as error:
        raise UserError(f"line {reader.line_num + 1}: not CSV ({error})") from error


def short_lines(text: io.TextIOWrapper) -> Iterator[str]:
    """The lines of a text. Raises csv.Error for one that does not belong into memory."""
    while line := text.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES:
            raise csv.Error(TOO_LONG)
        yield line


def parquet_rows(stream: IO[bytes]) -> Iterator[tuple[int, Row | str]]:
    return numbered(pq.ParquetFile(stream).iter_batches(batch_size=BATCH_ROWS))


def arrow_rows(stream: IO[bytes]) -> Iterator[tuple[int, Row | str]]:
    """Both kinds of Arrow's files: datasets writes streams, Feather is the kind with a footer."""
    is_file = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if is_file:
        reader = pa.ipc.open_file(stream)
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        return numbered(batches)
    return numbered(pa.ipc.open_stream(stream))


def numbered(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, Row | str]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for row in rows_of_table(batch.slice(start, BATCH_ROWS)):
                number += 1
                yield number, row
