"""An export in a process of its own, to which something happens at an exact place on its way."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

from export import ExportArguments, export
from finetune.export.record import Format

SHARD_BYTES = 100_000  # many shards of the tiny model


class Place(NamedTuple):
    """Where Python is about to do something with a file: its audit event, the end of the file's
    name, and which one of these it is.
    """

    event: str
    ending: str
    number: int


def run_export(run_dir: Path, output: Path, form: Format) -> None:
    args = ExportArguments(format=form, output=output, verify=False)
    export(run_dir, args, max_shard_bytes=SHARD_BYTES)


def run_export_until(
    place: Place, happens: Callable[[], None], run_dir: Path, output: Path, form: Format
) -> None:
    """Export, and call `happens` at a place. For a process that does nothing else: an audit hook
    cannot be removed.
    """
    left = place.number

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == place.event and str(arguments[0]).endswith(place.ending):
            left -= 1
            if left == 0:
                happens()

    sys.addaudithook(watch)
    run_export(run_dir, output, form)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_the_next_file() -> None:
    """Let the kernel kill this process at the thousandth byte that it writes to a file: safetensors
    writes without telling Python.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


class Pause:
    """Tells that the place is reached, and waits until it may go on."""

    def __init__(self, reached: Event, go_on: Event) -> None:
        self.reached, self.go_on = reached, go_on

    def __call__(self) -> None:
        self.reached.set()
        assert self.go_on.wait(timeout=600)
