"""Run the Python that a model card shows, as somebody would who has downloaded the folder."""

import io
import shutil
import tempfile
from contextlib import chdir, redirect_stdout
from pathlib import Path

from helpers.markdown import blocks


def run_python_of_card(folder: Path, *, base: Path) -> str:
    """Run the card's only block of Python, unchanged, in a copy of its folder; what it prints.

    base: the base model. A card names that of a tiny model by its folder alone, and so it lies in
    the current folder here.
    """
    (block,) = blocks(folder / "README.md", "python")
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        (Path(copy) / base.name).symlink_to(base)
        with chdir(copy), redirect_stdout(io.StringIO()) as printed:
            exec(compile(block.text, "card", "exec"), {})
    return printed.getvalue()
