"""Which module of sft/ imports which, read from the sources without running them.

    python tests/helpers/imports.py        the rooms floor by floor, and what each one imports

A room is a script, a package of finetune/ or a module that lies directly in it. The docstring of
finetune/__init__.py lists the floors.
"""

import ast
from collections.abc import Mapping
from pathlib import Path

SFT = Path(__file__).resolve().parents[2] / "sft"
SCRIPTS = "scripts"

Imports = dict[str, set[str]]


def module_files() -> dict[str, Path]:
    """The file of each module of sft/, by the name it is imported by."""
    files = {path.stem: path for path in SFT.glob("*.py")}
    for path in (SFT / "finetune").rglob("*.py"):
        parts = path.relative_to(SFT).with_suffix("").parts
        files[".".join(part for part in parts if part != "__init__")] = path
    return files


def imported_names(file: Path) -> set[str]:
    """Every name that a file imports, at its top or inside a function, in full."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_imports() -> Imports:
    """The modules of sft/ that each module of sft/ imports."""
    files = module_files()
    imports: Imports = {}
    for module, file in files.items():
        imports[module] = set()
        for name in imported_names(file):
            # "finetune.errors.UserError" names a module, and something in it.
            for candidate in (name, name.rpartition(".")[0]):
                if candidate in files:
                    imports[module].add(candidate)
                    break
    return imports


def room_of(module: str) -> str:
    """ "data" of finetune.data.sources, "errors" of finetune.errors, "train.py" of train."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else f"{module}.py"


def room_imports() -> Imports:
    """The rooms that each room imports, itself left out."""
    rooms: Imports = {}
    for module, imported in module_imports().items():
        if module == "finetune":
            continue
        room = room_of(module)
        rooms.setdefault(room, set()).update(room_of(other) for other in imported)
        rooms[room].discard(room)
    return rooms


def floors() -> list[list[str]]:
    """The rooms of each floor from the top, as the docstring of finetune/__init__.py lists them."""
    docstring = ast.get_docstring(ast.parse((SFT / "finetune/__init__.py").read_text())) or ""
    start = docstring.index(f"{SCRIPTS} ->")
    (paragraph, *_) = docstring[start:].split("\n\n")
    return [
        [room.strip() for room in floor.split(",")]
        for floor in " ".join(paragraph.split()).split("->")
    ]


def floor_numbers() -> dict[str, int]:
    """The floor of each room, 0 the lowest. Raises KeyError for a room that no floor names."""
    numbers = {room: number for number, floor in enumerate(reversed(floors())) for room in floor}
    return {room: numbers[SCRIPTS if room.endswith(".py") else room] for room in room_imports()}


def find_circle(imports: Mapping[str, set[str]]) -> list[str]:
    """A circle of imports, for example ["a", "b", "a"]; empty if there is none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for imported in sorted(imports[module]):
            if circle := search(imported, [*path, module]):
                return circle
        done.add(module)
        return []

    for module in sorted(imports):
        if circle := search(module, []):
            return circle
    return []


def print_floors() -> None:
    imports, numbers = room_imports(), floor_numbers()
    num_arrows = sum(len(imported) for imported in imports.values())
    print(f"{len(imports)} rooms on {max(numbers.values()) + 1} floors, {num_arrows} arrows")
    for floor in range(max(numbers.values()), -1, -1):
        print(f"\nfloor {floor}")
        for room in sorted(room for room, number in numbers.items() if number == floor):
            below = sorted(imports[room], key=lambda other: (-numbers[other], other))
            print(f"  {room:<14} -> {', '.join(below)}" if below else f"  {room}")


if __name__ == "__main__":
    print_floors()
