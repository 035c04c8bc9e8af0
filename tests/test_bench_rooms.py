"""The rooms of bench import one way, and no two of their files import each other, inside functions either."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1] / "bench"
HERE = "jasper_fast.bench"
# a room imports from itself and from those after it; rooms beside each other, nothing from one another
ORDER = (("__main__",), ("cli",), ("gpu", "tune"), ("commands", "compile"), ("report",), ("cases",), ("rivals",),
         ("harness",))  # fmt: skip
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def modules() -> dict[str, Path]:
    """Files by their names below jasper_fast.bench."""
    paths = [path for path in BENCH.rglob("*.py") if path.parent.name != "quick"]
    return {".".join(path.relative_to(BENCH).with_suffix("").parts): path for path in paths}


def imported(source: str, known: set[str]) -> set[str]:
    """The modules of bench that `source` imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {name.removeprefix(f"{HERE}.") for name in names} & known


def wrong(found: dict[str, set[str]]) -> list[str]:
    """Arrows that do not run from left to right."""
    pairs = [(module, other) for module, others in found.items() for other in others]
    rooms = [(module, other, module.split(".")[0], other.split(".")[0]) for module, other in pairs]
    return [f"{module} -> {other}" for module, other, a, b in rooms if a != b and RANK[a] >= RANK[b]]


def test_rooms_import_one_way_and_no_files_in_a_circle() -> None:
    paths = modules()
    found = {name: imported(path.read_text(), set(paths)) for name, path in paths.items()}
    assert found["cli"] >= {"gpu.gpu", "harness.run"} and found["cases.common"] >= {"cases.layers"}, "it sees nothing"
    assert wrong(found) == []
    tuple(TopologicalSorter(found).static_order())  # raises CycleError, which names the circle


def test_every_room_says_what_it_holds() -> None:
    for room in {path.parent for path in modules().values()} - {BENCH}:
        assert ast.get_docstring(ast.parse((room / "__init__.py").read_text())), room


def test_a_wrong_arrow_is_seen() -> None:
    source = f"def f():\n    from {HERE}.gpu import agenda"
    assert wrong({"harness.run": imported(source, {"gpu.agenda"})}) == ["harness.run -> gpu.agenda"]
    assert wrong({"gpu.agenda": {"tune.table"}}) == ["gpu.agenda -> tune.table"]
