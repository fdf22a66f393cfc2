"""The files, folders, URLs and hub datasets that conversations are read from, row by row.

A source is `NAME`, and several are separated by commas. `NAME*2` is read twice in an epoch, and of
`NAME*0.5` a random half is read. NAME is one of

    a path or an fsspec URL (s3://, gs://, https://), which may be a pattern with `*` in it
    a dataset on the hub, `owner/name`, with its config and split if needed:
    `owner/name:config@split`
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from glob import glob
from itertools import takewhile
from pathlib import Path

import fsspec
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from finetune.credentials import public_url
from finetune.data.arrow_types import rows_of_table
from finetune.data.checks import Row
from finetune.data.compression import COMPRESSIONS
from finetune.data.files import exists_here, format_of
from finetune.errors import UserError

BATCH_ROWS = 1000
NUMBER = re.compile(r"\d+(\.\d*)?|\.\d+")
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
    return [parse_source(part) for part in split_at_commas(text)]


def parse_source(part: str) -> Source:
    if exists_here(part):
        return Source(part)
    name, star, weight = part.rpartition("*")
    # The last star may belong to a pattern instead of a weight: data/*.jsonl or data/*
    is_weight = format_of(name) or NUMBER.fullmatch(weight.strip())
    if not star or not is_weight:
        return Source(part)
    try:
        source = Source(name.strip(), float(weight))
    except ValueError:
        raise UserError(
            f"dataset {part!r}: {weight!r} is not a weight; write it like 'a.jsonl*2'"
        ) from None
    if not 0 < source.weight < 1000:
        raise UserError(f"dataset {part!r}: a weight must be more than 0 and less than 1000")
    return source


def split_at_commas(text: str) -> list[str]:
    """The sources in a list. A comma in the name of a file or folder of this machine stays, and one
    in the query of a URL.

    Raises UserError if it could be either.
    """
    parts = text.split(",")
    sources = []
    while parts:
        lengths = range(len(parts), 1, -1)
        length = next((n for n in lengths if exists(",".join(parts[:n]))), 1)
        if length > 1 and all(map(exists, parts[:length])):
            names = " and ".join(repr(part.strip()) for part in parts[:length])
            raise UserError(f"{','.join(parts[:length])!r} may be a file or {names}: rename it")
        if "://" in parts[0] and "?" in parts[0]:
            continued = takewhile(partial(is_of_query, url=parts[0]), parts[1:])
            length = 1 + len(list(continued))
        source = ",".join(parts[:length])
        sources.append(source if exists_here(source) else source.strip())
        parts = parts[length:]
    return [source for source in sources if source]


def is_of_query(part: str, *, url: str) -> bool:
    """Whether what follows a comma belongs to the query of the URL before it.

    Raises UserError if it could also be a dataset on the hub.
    """
    name = part.strip()
    if not name or "://" in name or exists(name) or format_of(name) or "/" in name:
        return False
    if "=" in name or "&" in name:
        return True
    raise UserError(
        f"dataset {public_url(url)!r}: it is unclear whether what follows the comma behind it is "
        "part of its query or another source: write a comma of the query as %2C, or name the "
        "other source first"
    )


def exists(part: str) -> bool:
    """Whether a source is a file, a folder or a pattern that matches on this machine."""
    name = re.sub(rf"\*({NUMBER.pattern})$", "", part.strip())
    path = Path(name).expanduser()
    return bool(name) and (path.exists() or ("*" in name and bool(glob(str(path)))))


def is_file(name: str) -> bool:
    """Whether NAME is a path or a URL, and not the name of a hub dataset."""
    looks_like_file = (
        "://" in name
        or "*" in name
        or name.startswith((".", "/", "~"))
        or format_of(name)
        or name.endswith(COMPRESSIONS)
    )
    return bool(looks_like_file) or fsspec.filesystem("file").exists(name)


def read_hub(name: str, *, config: str | None, split: str) -> Dataset:
    """A hub dataset. The name's own config and split win. Raises UserError if it cannot be read."""
    match = HUB_NAME.fullmatch(name)
    if match is None:
        hint = ": of patterns, only `*` is known" if any(sign in name for sign in "?{") else ""
        raise UserError(
            f"dataset {name!r} is neither a file nor a hub name like owner/name:config@split{hint}"
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


def rows_of_hub(dataset: Dataset) -> Iterator[Row]:
    """The rows of a hub dataset as those of the same data in a file would be."""
    for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
        yield from rows_of_table(table)
