"""The README names only what there is."""

import re

import pytest

from helpers.paths import REPO, TASK_FILES

README = (REPO / "README.md").read_text()


def test_every_recipe_is_in_the_table() -> None:
    for task_file in TASK_FILES:
        assert f"[{task_file.name}]({task_file.name})" in README


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_linked_files_exist(path: str) -> None:
    assert (REPO / path).exists()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:sft|tests)/[\w*./-]*)`", README))))
def test_named_files_exist(path: str) -> None:
    assert path == "sft/my.jsonl" or list(REPO.glob(path))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)", README))))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (REPO / "Makefile").read_text(), re.M)


def test_it_stays_readable() -> None:
    assert len(README.splitlines()) <= 200
