"""Rows of JSON and JSON lines, however large the file is: one line or element at a time."""

import io
import json
import re
from collections.abc import Iterator
from json import JSONDecodeError, JSONDecoder
from typing import IO, Any

from finetune.data.checks import Row
from finetune.data.values import type_in_words, unique_keys
from finetune.errors import UserError

# Longer than any conversation. A file without line feeds reaches it, and is not read into memory.
MAX_LINE_BYTES = 64 * 2**20
READ_CHARACTERS = 2**20
SPACE = re.compile(r"[ \t\r\n]*")
TOO_LONG = f"longer than {MAX_LINE_BYTES // 2**20} MiB"


def jsonl_rows(stream: IO[bytes]) -> Iterator[tuple[int, Row | str]]:
    """(line, row) of every line that is not blank; see formats.read_file."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):  # skip the rest of the line
                line = stream.readline(MAX_LINE_BYTES)
            yield number, f"{TOO_LONG}: one conversation a line"
        elif line.strip():
            yield number, parse_object(line.rstrip(b"\r\n"))


def json_rows(stream: io.BufferedReader) -> Iterator[tuple[int, Row | str]]:
    """The rows of an array, of objects one after the other, or of JSON lines in a file named .json.

    Of the first two, the number is that of the row. Raises UserError where the JSON breaks off or
    is wrong: nobody can tell where the next row begins.
    """
    first_line = stream.peek(1).partition(b"\n")[0]
    if isinstance(parse_object(first_line), dict):
        yield from jsonl_rows(stream)
        return
    values = JsonValues(io.TextIOWrapper(stream, encoding="utf-8-sig"))
    for number, value in enumerate(values, start=1):
        is_row = isinstance(value, dict | str)
        yield number, value if is_row else f"{type_in_words(value)}, not an object"


class JsonValues:
    """The elements of a JSON array, or values one after the other, without the file in memory.

    A string among the values says what is wrong with the value in its place.
    """

    def __init__(self, text: io.TextIOWrapper) -> None:
        self.text = text
        self.buffer, self.start, self.at_end = "", 0, False
        self.lines_before, self.columns_before = 0, 0  # what has been dropped from the buffer
        self.num_values = 0

    def __iter__(self) -> Iterator[Any]:
        is_array = self.next_character() == "["
        if is_array:
            self.start += 1
            if self.next_character() == "]":
                self.start += 1
                self.expect_end()
                return
        while is_array or self.next_character():
            self.num_values += 1
            self.next_character()
            yield self.next_value()
            if not is_array:
                continue
            following = self.next_character()
            if following not in (",", "]"):
                raise self.broken("not JSON (Expecting ',' delimiter", self.start)
            self.start += 1
            if following == "]":
                self.expect_end()
                return

    def read_more(self) -> None:
        """Double the rest of the buffer. What came before is dropped."""
        line_start = self.buffer.rfind("\n", 0, self.start) + 1
        self.columns_before = self.start - line_start + (0 if line_start else self.columns_before)
        self.lines_before += self.buffer.count("\n", 0, self.start)
        rest = self.buffer[self.start :]
        try:
            more = self.text.read(max(READ_CHARACTERS, len(rest)))
        except UnicodeDecodeError:
            raise UserError(f"not UTF-8, in row {self.num_values} or soon after it") from None
        self.buffer, self.start, self.at_end = rest + more, 0, not more

    def next_character(self) -> str:
        """The next character that is no space, and stays there; empty at the end of the file."""
        while True:
            match = SPACE.match(self.buffer, self.start)
            assert match is not None
            self.start = match.end()
            if self.start < len(self.buffer) or self.at_end:
                return self.buffer[self.start : self.start + 1]
            self.read_more()

    def next_value(self) -> Any:
        while True:
            try:
                value, end = decode_value(self.buffer, self.start)
            except JSONDecodeError as error:
                if self.at_end:
                    raise self.broken(f"not JSON ({error.msg}", error.pos) from None
            except RecursionError:
                raise self.broken(
                    "not JSON that can be read (nested too deep", self.start
                ) from None
            else:
                if end < len(self.buffer) or self.at_end:  # the rest of a number may be to come
                    self.start = end
                    return value
            if len(self.buffer) - self.start > MAX_LINE_BYTES:
                raise self.broken(f"{TOO_LONG} or not JSON (begins", self.start)
            self.read_more()

    def expect_end(self) -> None:
        if self.next_character():
            raise self.broken("not JSON (Extra data", self.start)

    def broken(self, what: str, position: int) -> UserError:
        line = self.lines_before + self.buffer.count("\n", 0, position) + 1
        line_start = self.buffer.rfind("\n", 0, position) + 1
        column = position - line_start + 1 + (0 if line_start else self.columns_before)
        return UserError(f"row {max(self.num_values, 1)}: {what} at line {line} column {column})")


def decode_value(text: str, start: int) -> tuple[Any, int]:
    """A JSON value and its end, or what is wrong with it in its place. Raises JSONDecodeError."""
    try:
        value, end = STRICT.raw_decode(text, start)
    except JSONDecodeError:
        raise
    except ValueError as error:  # of unique_keys
        return str(error), PLAIN.raw_decode(text, start)[1]
    return described(value), end


def parse_object(line: bytes) -> Row | str:
    """The object in a line of JSON, or what is wrong with the line."""
    value = parse_json(line)
    return value if isinstance(value, str | dict) else f"{type_in_words(value)}, not an object"


def parse_json(text: bytes) -> Any:
    """The value in a JSON text. A returned string always says what is wrong: no row is a string."""
    try:
        return described(json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique_keys))
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start})"
    except JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    except RecursionError:
        return "not JSON that can be read: nested too deep"
    except ValueError as error:
        return str(error)


def described(value: Any) -> Any:
    """The value, or if it is a string, a string that says so."""
    return f"the text {value[:20]!r}, not an object" if isinstance(value, str) else value


STRICT, PLAIN = JSONDecoder(object_pairs_hook=unique_keys), JSONDecoder()
