"""Ways in which a file of a run's folder can turn into garbage."""

import os
from collections.abc import Callable
from pathlib import Path


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


RUINS: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "empty": lambda file: os.truncate(file, 0),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "{}": lambda file: file.write_text("{}"),
    "[]": lambda file: file.write_text("[]"),
    "a folder": replace_by_folder,
    "a dangling link": replace_by_link,
}
