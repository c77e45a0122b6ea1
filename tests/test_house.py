"""The house: which room lies on which floor, and that imports only go down. `python tests/test_house.py` prints it."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the roof to the ground; rooms of one floor do not know each other.
FLOORS = [
    ["recipes", "benchmarks"],
    ["engine.commands"],
    ["engine.run"],
    ["engine.api"],
    ["engine.training"],
    ["engine.strategies", "engine.evaluation"],
    ["engine.memory", "engine.data"],
    ["engine.models", "engine.supervision"],
    ["engine.config"],
    ["engine.process"],
    ["engine.parallel", "engine.units", "engine.checks"],
    ["kernels"],
    ["engine.files", "engine.logger", "engine.seeding"],
    ["engine.errors"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_LINES, MEDIAN_LINES = 400, 150


def files(root: Path = ROOT) -> list[Path]:
    return sorted(path for top in ("engine", "kernels", "recipes", "benchmarks") for path in (root / top).rglob("*.py"))


def room_of(module: str) -> str:
    """The room of a module such as engine.data.slide: a folder of engine/, a file of its own there, or a top folder."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "engine" else parts[0]


def imports(path: Path, root: Path = ROOT) -> Iterator[tuple[str, str, int]]:
    """(room, room that it imports, line) of a file, wherever in it the import stands."""
    module = ".".join(path.relative_to(root).with_suffix("").parts)
    if module == "engine.__init__":  # the face looks at all rooms, when it is asked
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        for name in names:
            if not name.startswith(("slidescale.engine.", "slidescale.kernels")):
                continue
            room = room_of(name.removeprefix("slidescale."))
            if room in FLOOR and room != room_of(module):
                yield room_of(module), room, getattr(node, "lineno", 0)


def upward(root: Path = ROOT) -> list[str]:
    """Imports that do not go down, each once."""
    found = [
        f"{path.relative_to(root)}:{line}: {room} imports {other}"
        for path in files(root)
        for room, other, line in imports(path, root)
        if FLOOR[other] <= FLOOR[room]
    ]
    return list(dict.fromkeys(found))


def test_imports_go_down() -> None:
    assert not upward()


def test_every_file_has_a_room() -> None:
    rooms = {room_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) for path in files()}
    assert rooms - {"engine.__init__"} == set(FLOOR), "a room and its floor"


def test_an_import_that_runs_up_is_found(tmp_path: Path) -> None:
    for name, text in {
        "engine/data/bag.py": "from slidescale.engine.training.step import Step\n",
        "engine/memory/usage.py": "def f():\n    from slidescale.engine import run\n",
        "engine/models/lora.py": "from slidescale.engine import errors\nimport slidescale.engine.supervision.make\n",
    }.items():
        (path := tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert upward(tmp_path) == [
        "engine/data/bag.py:1: engine.data imports engine.training",
        "engine/memory/usage.py:2: engine.memory imports engine.run",
        "engine/models/lora.py:2: engine.models imports engine.supervision",
    ]


def test_files_are_of_a_readers_size() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files()}
    assert not {str(path): count for path, count in lines.items() if count > MOST_LINES}
    assert statistics.median(lines.values()) <= MEDIAN_LINES


@pytest.mark.parametrize(
    ("package", "file"), [("deepspeed", "engine/strategies/zero.py"), ("openslide", "engine/data/openslide.py")]
)
def test_a_library_has_one_door(package: str, file: str) -> None:
    found = set()
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == package for name in names):
                found.add(str(path.relative_to(ROOT)))
    assert found == {file}


def show() -> None:
    """The floors, and what each room imports."""
    below: dict[str, set[str]] = {room: set() for room in FLOOR}
    for path in files():
        for room, other, _ in imports(path):
            below[room].add(other)
    for floor, rooms in enumerate(FLOORS):
        for room in rooms:
            others = sorted(below[room], key=lambda each: (FLOOR[each], each))
            print(f"{floor:2}  {room:<20} -> {', '.join(others) or 'nothing'}")
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in files()]
    print(f"{len(FLOOR)} rooms, {sum(map(len, below.values()))} arrows, of which {len(upward())} imports run up")
    print(f"{len(lines)} files: median {statistics.median(lines):.0f} lines, longest {max(lines)}")


if __name__ == "__main__":
    show()
