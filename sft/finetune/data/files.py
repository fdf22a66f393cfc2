"""The files of a folder, a pattern, a URL or a zip archive, and which of them belong to a split."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from zipfile import ZipFile

import datasets
import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from finetune.data.compression import COMPRESSIONS
from finetune.errors import UserError

# Each ending of a file's name, and the one that stands for its format.
FORMATS = {
    ".jsonl": ".jsonl",
    ".ndjson": ".jsonl",
    ".jsonlines": ".jsonl",
    ".json": ".json",
    ".parquet": ".parquet",
    ".csv": ".csv",
    ".tsv": ".tsv",
    ".arrow": ".arrow",
    ".feather": ".arrow",
}
# Words in a file's name that say which split it holds, as `datasets` reads them.
SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation", "holdout", "heldout"},
}
# What save_to_disk writes beside the data.
BOOKKEEPING = ("state.json", "dataset_info.json", "dataset_dict.json")
MAX_NAMES = 5  # how many file names a note lists


@dataclass(frozen=True)
class DataFile:
    """A file with rows. key: changes whenever its content does. member: its name in a zip archive.

    The URL of a local file is its path.
    """

    url: str
    key: str
    member: str | None = None
    size: int | None = None  # bytes, where the server tells

    @property
    def place(self) -> str:
        """The file as a person would look it up."""
        return self.url if self.member is None else f"{self.url}/{self.member}"

    @property
    def name(self) -> str:
        """Its file name in lower case, which ends as its format and its compression have it."""
        name = base_name(self.url)
        if self.member is None:
            return name
        member = base_name(self.member)
        # rows.jsonl.zip may hold a file called just "rows".
        return member if format_of(member) else member + (format_of(name) or "")


@dataclass(frozen=True)
class Found:
    """The files to read, and a note in words for each kind of file that was left alone."""

    files: list[DataFile]
    notes: list[str]


def base_name(url: str) -> str:
    """The last part of a path or URL, in lower case. A signed URL has its signature behind it."""
    path = urlsplit(url).path if re.match("https?://", url) else url
    return path.rstrip("/").rsplit("/", 1)[-1].lower()


def format_of(name: str) -> str | None:
    """The format that the ending of a name stands for, before its compression; None without one."""
    name = base_name(name)
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return next((FORMATS[ending] for ending in FORMATS if name.endswith(ending)), None)


def find_files(name: str, *, split: str = "train") -> Found:
    """The files of a split in a file, a folder, a pattern or a zip archive.

    Raises UserError if there is no such file.
    """
    try:
        filesystem, path = filesystem_of(name)
        paths, root = list_files(filesystem, path)
        listed = [data_file(filesystem, path) for path in without_bookkeeping(filesystem, paths)]
        files = [member for file in listed for member in members(file)]
    except UserError:
        raise
    except Exception as error:  # each remote file system raises exceptions of its own
        raise UserError(
            f"dataset {name!r} cannot be read: {type(error).__name__}: {error}"
        ) from error
    if not files:
        raise nothing_found(name, is_folder=root != path and "*" not in path, is_empty=bool(listed))
    if all(map(is_nested, files)):
        names = listing(file.place for file in files)
        raise UserError(
            f"dataset {name!r} holds nothing but archives in an archive: unpack {names}"
        )
    if len(files) == 1 and root == path:
        if split != "train":
            raise no_split(name, split, [])
        return Found(files, [])
    return choose(name, files, root=url_of(filesystem, root), split=split)


def nothing_found(name: str, *, is_folder: bool, is_empty: bool) -> UserError:
    """Why a source has no files. is_empty: there are archives, and nothing in them."""
    if is_empty:
        return UserError(f"dataset {name!r} holds no file: the archive is empty")
    if is_folder:
        return UserError(f"dataset {name!r} is a folder without data in it")
    if "://" not in name and any(sign in name for sign in "?[{"):
        return UserError(f"dataset {name!r} does not exist: of patterns, only `*` is known")
    return UserError(
        f"dataset {name!r} does not exist: set DATASET to a file, a folder or a hub name"
    )


def filesystem_of(name: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it.

    What exists on this machine is a path, even if its name has fsspec's `::` in it.
    """
    if "::" in name and exists_here(name):
        return LocalFileSystem(), str(Path(name).expanduser().absolute())
    return fsspec.url_to_fs(name)


def exists_here(name: str) -> bool:
    return bool(name) and "://" not in name and Path(name).expanduser().exists()


def list_files(filesystem: Any, path: str) -> tuple[list[str], str]:
    """The paths of all files below a path or pattern, and the folder that their names begin with.

    Of a file, its own path takes the place of that folder.
    """
    is_local = isinstance(filesystem, LocalFileSystem)
    if "*" in path and not (is_local and exists_here(path)):
        if is_local:
            files = files_of_pattern(path)
        else:
            found = filesystem.glob(path, detail=True)
            files = [file for file, info in found.items() if info["type"] != "directory"]
        return sorted(files), path.split("*")[0].rpartition("/")[0] + "/"
    if is_local and os.path.isdir(path):
        return sorted(files_below(path)), path.rstrip("/") + "/"
    # Over HTTP, `isdir` would read a whole file to look for links in it.
    if not is_http(filesystem) and filesystem.isdir(path):
        return sorted(filesystem.find(path)), path.rstrip("/") + "/"
    try:
        filesystem.info(path)
    except FileNotFoundError as error:
        status = getattr(error.__cause__, "status", 404)
        if status != 404:  # of HTTP; a signature that has expired gives 403
            raise UserError(f"dataset {path!r}: the server answers {status}") from error
        return [], path
    return [path], path


def files_of_pattern(path: str) -> list[str]:
    """The files of this machine that match a pattern, as fsspec understands it."""
    folder = re.split(r"[*?\[]", path)[0].rpartition("/")[0] or "/"
    if not os.path.isdir(folder):
        return []
    depth = None if "**" in path else path.removeprefix(folder).lstrip("/").count("/")
    pattern = re.compile(glob_translate(path))
    return [file for file in files_below(folder, depth=depth) if pattern.match(file)]


def files_below(
    folder: str, *, depth: int | None = None, parents: tuple[str, ...] = ()
) -> Iterator[str]:
    """The files of a folder of this machine, and of those below it, behind links too.

    fsspec's `find` follows no links and passes over folders that it may not read. A link to a
    folder that it stands in holds nothing else. Raises OSError for a folder that cannot be read.
    depth: how many folders lie between this one and the deepest files; None for any number.
    """
    parents = (*parents, os.path.realpath(folder))
    below = None if depth is None else depth - 1
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry.path
            elif depth != 0 and os.path.realpath(entry.path) not in parents:
                yield from files_below(entry.path, depth=below, parents=parents)


def is_http(filesystem: Any) -> bool:
    return "http" in filesystem.protocol or "https" in filesystem.protocol


def without_bookkeeping(filesystem: Any, paths: list[str]) -> list[str]:
    """The paths, without what save_to_disk writes beside its data and `map` leaves there.

    Raises UserError if the folder lacks a file that its state.json lists.
    """
    folders = {path.rpartition("/")[0] for path in paths if path.endswith(".arrow")}
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name == "state.json" and folder in folders:
            for entry in json.loads(filesystem.cat_file(path))["_data_files"]:
                if f"{folder}/{entry['filename']}" not in paths:
                    raise UserError(f"{path} lists {entry['filename']}, which is not there")
    parents = {folder.rpartition("/")[0] for folder in folders}

    def is_bookkeeping(path: str) -> bool:
        folder, _, name = path.rpartition("/")
        is_cache = name.startswith("cache-") and f"{folder}/state.json" in paths
        return (folder in folders and (name in BOOKKEEPING or is_cache)) or (
            folder in parents and name == "dataset_dict.json"
        )

    return [path for path in paths if not is_bookkeeping(path)]


def data_file(filesystem: Any, path: str) -> DataFile:
    info = filesystem.info(path)
    # Where a server redirects to a signed address, that is another one each time.
    info = {name: value for name, value in info.items() if name != "url"}
    key = sha256(str(info).encode()).hexdigest()
    return DataFile(url_of(filesystem, path), key, size=info.get("size"))


def url_of(filesystem: Any, path: str) -> str:
    """The path of a local file, the URL of another."""
    if isinstance(filesystem, LocalFileSystem):
        return path
    return str(filesystem.unstrip_protocol(path))


def members(file: DataFile) -> list[DataFile]:
    """The file itself, or the files in it if it is a zip archive."""
    if not base_name(file.url).endswith(".zip"):
        return [file]
    with ZipFile(local_path(file)) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    if any(entry.flag_bits & 1 for entry in entries):
        raise UserError(f"{file.url} is encrypted: unpack it")
    return [DataFile(file.url, file.key, entry.filename, entry.file_size) for entry in entries]


def local_path(file: DataFile) -> Path:
    """A path at which to read the file. A remote file is downloaded there if it is not yet.

    It stays in the cache of `datasets`, beside the tokens, for the ranks and for the next launch.
    """
    filesystem, path = filesystem_of(file.url)
    if isinstance(filesystem, LocalFileSystem):
        return Path(path)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "remote"
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / sha256(f"{file.url} {file.key}".encode()).hexdigest()
    if not copy.exists():
        unfinished = copy.with_suffix(f".{os.getpid()}")
        try:
            filesystem.get_file(path, str(unfinished))
            unfinished.replace(copy)
        finally:
            unfinished.unlink(missing_ok=True)
    return copy


def choose(name: str, files: list[DataFile], *, root: str, split: str) -> Found:
    """Which of several files to read for a split. A note names those that are left alone.

    root: the beginning that the files' places share. Raises UserError if none is left.
    """
    relative = {file: file.place.removeprefix(root).lstrip("/") for file in files}
    hidden = [file for file in files if is_hidden(relative[file])]
    unknown = [file for file in files if file not in hidden and not is_known(file)]
    empty = [file for file in files if file not in (*hidden, *unknown) and file.size == 0]
    readable = [file for file in files if file not in (*hidden, *unknown, *empty)]
    if not readable:
        names = listing(relative[file] for file in files)
        raise UserError(
            f"folder {name!r} holds no file that ends in {', '.join(FORMATS)}, but {names}"
        )
    chosen = [file for file in readable if is_of_split(relative[file], split)]
    if split == "train" and not chosen:  # somebody who names a test set alone means it
        chosen = readable
    if not chosen:
        raise no_split(name, split, sorted({split_of(relative[file]) for file in readable}))
    notes = {
        "of no known format": unknown,
        "hidden": hidden,
        "empty": empty,
        f"of another split than {split}": [file for file in readable if file not in chosen],
    }
    return Found(
        chosen,
        [
            f"not read, {reason}: {listing(relative[file] for file in left)}"
            for reason, left in notes.items()
            if left
        ],
    )


def is_hidden(relative: str) -> bool:
    """Whether a program keeps the file for itself. macOS puts a twin of each into a zip archive."""
    return any(part.startswith((".", "__MACOSX")) for part in relative.split("/"))


def is_known(file: DataFile) -> bool:
    return format_of(file.name) is not None and not is_nested(file)


def is_nested(file: DataFile) -> bool:
    """Whether it is an archive in an archive."""
    return file.member is not None and file.member.lower().endswith(".zip")


def split_of(relative: str) -> str:
    """The split that the words of a file's name and folders speak of; "train" if of none."""
    words = set(re.split("[^a-z]+", relative.lower()))
    return next((split for split, names in SPLIT_WORDS.items() if words & names), "train")


def is_of_split(relative: str, split: str) -> bool:
    """A split with a name of its own is a folder, or the beginning of a file's name."""
    if split in SPLIT_WORDS:
        return split_of(relative) == split
    return any(re.match(rf"{re.escape(split)}([.-]|$)", part) for part in relative.split("/"))


def no_split(name: str, split: str, splits: list[str]) -> UserError:
    has = f" but {' and '.join(splits)}" if splits else ""
    return UserError(
        f"{name!r} has no split {split!r}{has}: hold out a share of it with --test_split_size 0.02"
    )


def listing(names: Iterable[str]) -> str:
    """Some of the names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
