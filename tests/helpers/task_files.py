"""Copies of a task file with one flag more, in each of the places where a user can give it."""

import shutil
from pathlib import Path

import pytest

from helpers.paths import REPO

PLACES = ("flags of the file", "TRAIN_ARGS of the file", "TRAIN_ARGS of the environment")


def task_with_flag(
    name: str, flag: str, place: str, *, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A copy of a task file of this repository that is launched with one flag more."""
    monkeypatch.delenv("TRAIN_ARGS", raising=False)
    (folder / "sft").mkdir()
    for config in (REPO / "sft").glob("*.yaml"):
        shutil.copy(config, folder / "sft")
    text = (REPO / f"{name}.yaml").read_text()
    if place == "TRAIN_ARGS of the environment":
        monkeypatch.setenv("TRAIN_ARGS", flag)
    elif place == "TRAIN_ARGS of the file":
        text = replaced(text, '  TRAIN_ARGS: ""', f'  TRAIN_ARGS: "{flag}"')
    else:
        text = replaced(text, "    $TRAIN_ARGS\n", f"    {flag}\n    $TRAIN_ARGS\n")
    copy = folder / f"{name}.yaml"
    copy.write_text(text)
    return copy


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)
