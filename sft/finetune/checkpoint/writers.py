"""The launches that write to a run's folder: writers/NNNN-<id>.json, one small file for each.

Its name alone orders the launches: the highest number is the newest, and of two launches that took
one number at the same moment the one with the higher id, which then takes another number. Its
content says who that is: host, started (Unix time), the run's fingerprint. No launch ever writes
over another one's file.
"""

import json
import re
import secrets
import socket
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.checkpoint.fingerprint import RunRecord, changed_fields
from finetune.errors import UserError

FOLDER = "writers"
LAUNCHES = "launches"  # history.py's records: one that trains has the number of its file here
NAME = re.compile(r"(\d{4,})-([0-9a-f]{8})\.json", re.ASCII)


@dataclass(frozen=True, order=True)
class Writer:
    """One launch. Of two, the greater one is the newer."""

    number: int
    id: str
    host: str = field(default="unknown", compare=False)
    started: float | None = field(default=None, compare=False)  # Unix time
    fingerprint: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        return f"{self.number:04}-{self.id}"

    def __str__(self) -> str:
        """Which launch this is, for the log."""
        if self.started is None:
            return f"number {self.number}, host {self.host}"
        moment = datetime.fromtimestamp(self.started, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"number {self.number}, host {self.host}, started {moment}"


def file_of(writer: Writer, run_dir: Path) -> Path:
    return run_dir / FOLDER / f"{writer.name}.json"


def new_writer(number: int, fingerprint: dict[str, Any]) -> Writer:
    """This process, as a writer of that number."""
    return Writer(number, secrets.token_hex(4), socket.gethostname(), time.time(), fingerprint)


def write_writer(writer: Writer, run_dir: Path) -> Path:
    """Write the launch's file and return it."""
    file = file_of(writer, run_dir)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(asdict(writer), indent=2))
    return file


def newest_writer(run_dir: Path) -> Writer | None:
    """The newest launch that has claimed the run, or None. Raises OSError if the folder cannot be
    read.
    """
    writers = named_writers(run_dir)
    return with_content(max(writers), run_dir) if writers else None


def has_double(writer: Writer, run_dir: Path) -> bool:
    """Whether another launch has the same number. Raises OSError if the folder cannot be read."""
    return any(w.number == writer.number and w != writer for w in named_writers(run_dir))


def named_writers(run_dir: Path) -> list[Writer]:
    """What the names of the files say: numbers and ids. Raises OSError as newest_writer does."""
    try:
        names = [match for path in (run_dir / FOLDER).iterdir() if (match := match_name(path))]
    except FileNotFoundError:
        return []
    return [Writer(int(match[1]), match[2]) for match in names]


def launch_numbers(run_dir: str | Path) -> list[int]:
    """The numbers of the launches that have a record, whatever it holds."""
    files = (Path(run_dir) / LAUNCHES).glob("*.json")
    return [int(file.stem) for file in files if file.stem.isdecimal()]


def match_name(path: Path) -> re.Match[str] | None:
    return NAME.fullmatch(path.name)


def with_content(writer: Writer, run_dir: Path) -> Writer:
    """The writer with what its file says of it. What is damaged or being written says nothing."""
    try:
        content = json.loads(file_of(writer, run_dir).read_text())
        moment = float(content["started"])
        datetime.fromtimestamp(moment, UTC)
        host, fingerprint = content["host"], dict(content["fingerprint"])
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return writer
    return Writer(writer.number, writer.id, str(host), moment, fingerprint)


def check_newest_writer(run_dir: Path, current: RunRecord) -> None:
    """Raise UserError if the newest launch of this folder trains something else. It may be running,
    and there need not be a checkpoint yet that says what it trains.
    """
    newest = newest_writer(run_dir)
    if newest is None or not newest.fingerprint:
        return
    file = file_of(newest, run_dir)
    changed = changed_fields(RunRecord.from_json(newest.fingerprint, file=file), current)
    if changed:
        raise UserError(
            f"{file} is of a launch of another run ({'; '.join(changed)}): start this one under "
            f"another RUN_NAME, or stop that launch and delete {run_dir} to start anew, or go on "
            "all the same with --ignore_fingerprint true"
        )
