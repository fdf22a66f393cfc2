"""Imports point one way: from the scripts down, floor by floor (finetune/__init__.py)."""

from helpers.imports import (
    find_circle,
    floor_numbers,
    floors,
    imported_names,
    module_imports,
    room_imports,
)
from helpers.paths import REPO


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert find_circle(module_imports()) == []
    assert find_circle(room_imports()) == []


def test_a_circle_is_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_a_room_imports_only_from_lower_floors() -> None:
    """So data and model, or training and export, never import each other, nor do scripts."""
    numbers = floor_numbers()
    wrong = [
        f"{room} -> {imported}"
        for room, below in room_imports().items()
        for imported in below
        if numbers[imported] >= numbers[room]
    ]
    assert wrong == []


def test_the_floors_name_every_room_and_nothing_else() -> None:
    rooms = {room for room in room_imports() if not room.endswith(".py")}
    assert rooms == {room for floor in floors()[1:] for room in floor}


def test_no_test_imports_a_test() -> None:
    tests = sorted((REPO / "tests").rglob("test_*.py"))
    names = {path.stem for path in tests} | {"conftest"}
    wrong = [
        f"{path.relative_to(REPO)} -> {name}"
        for path in tests
        for name in imported_names(path)
        if names & set(name.split("."))
    ]
    assert wrong == []
