"""Imports go one way: train.py and the tests import rooms, and a room imports only the rooms that LAYERS lists for it.

A room is a key of LAYERS: a folder of the package, or a file such as bench/cli.py. Imports inside functions count too.
"""

import ast
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest
from bench_runs import ROOT, python

MAPPED = ("kernels", "bench")  # folders that setup.py maps into the package
KERNELS_MAY = {"torch", "triton", "numpy", "cupy", "cupy_backends"} | sys.stdlib_module_names

# What each room may import besides itself; "" means the files directly in the package.
LAYERS = {
    "kernels": set(),
    "speech": set(),
    "lm": {"training", "nn", "data", "speech", "dispatch", "kernels"},
    "data": {"speech"},
    "dispatch": {"kernels"},
    "ops": {"dispatch", "kernels"},
    "nn": {"ops", "dispatch", "kernels"},
    "selfcheck": {"ops", "dispatch", "kernels"},
    "tuning": {"selfcheck", "ops", "dispatch", "kernels"},
    "training": {"nn", "ops", "data", "speech", "dispatch", "kernels"},
    "inference": {"nn", "data", "speech", "ops", "dispatch", "kernels"},
    "demo": {"inference", "lm", "training", "nn", "data", "speech", "ops", "dispatch", "kernels"},
    "cli": {"bench.cli", "inference", "tuning", "lm", "selfcheck", "training", "nn", "data", "speech"}
    | {"dispatch", "kernels"},
    "": {"cli"},
}
# Modules that import nothing of the package except each other.
BELOW_ALL = {"jasper_fast", "jasper_fast.extras", "jasper_fast.options", "jasper_fast.page"}
PACKAGE = set(LAYERS) - {"demo", "cli", ""}
BENCH = ("harness", "rivals", "cases", "report", ("commands", "compile"), ("gpu", "tune"), "cli", "__main__")
for rank, rooms in enumerate(BENCH):  # a room may import the earlier ones, but not those of its own group
    below = {f"bench.{r}" for group in BENCH[:rank] for r in ((group,) if isinstance(group, str) else group)}
    for name in (rooms,) if isinstance(rooms, str) else rooms:
        LAYERS[f"bench.{name}"] = below | PACKAGE


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"no Python files in {folders}"
    return [path for path in found if path.parent.name != "quick"]  # bench/quick holds tests


def imports(source: str, package: str) -> set[str]:
    """Returns the absolute dotted names that `source`, a module in `package`, imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names.add(node.args[0].value)
    return names


def name_of(path: Path) -> str:
    """Returns the dotted name of a file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("jasper_fast", *parts) if parts[0] in MAPPED else parts
    return ".".join(parts).removesuffix(".__init__")


def package_of(path: Path) -> str:
    name = name_of(path)
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


def graph() -> dict[str, set[str]]:
    """Returns the modules of the package, each with the modules that it imports."""
    named = {name_of(path): path for path in files("jasper_fast", *MAPPED)}
    found = {}
    for name, path in named.items():
        targets = set()
        for target in imports(path.read_text(), package_of(path)):
            while target and target not in named:  # a function or class counts as its module
                target = target.rpartition(".")[0]
            targets |= {target} if target else set()
        found[name] = targets - {name, *BELOW_ALL}
    return found


def room(module: str) -> str:
    """Returns the room of a module, or "" for a file directly in the package."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:2]), *parts[:1]] if parts[:1] == ["bench"] else parts[:1]
    return next((name for name in names if name in LAYERS), "")


def wrong_arrows(arrows: dict[str, set[str]]) -> list[str]:
    return [
        f"{a} -> {b}" for a in sorted(arrows) for b in sorted(arrows[a]) if room(b) not in LAYERS[room(a)] | {room(a)}
    ]


def kernels_fault(name: str) -> bool:
    return name.split(".")[0] not in KERNELS_MAY and not name.startswith("jasper_fast.kernels.")


def package_fault(name: str) -> bool:
    return name.split(".")[0] in {*MAPPED, "tests", "train", "conftest", "close"}


def faults(paths: list[Path], fault) -> set[str]:
    return {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in paths
        for name in imports(path.read_text(), package_of(path))
        if fault(name)
    }


def test_rooms_import_only_the_rooms_below_them() -> None:
    arrows = graph()
    assert "jasper_fast.dispatch.probe" in arrows["jasper_fast.dispatch.verdicts"], "the graph has no arrows"
    assert wrong_arrows(arrows) == []
    assert {name: arrows[name] for name in BELOW_ALL if arrows[name]} == {}


def test_every_room_is_in_the_table_and_says_what_it_holds() -> None:
    folders = [path.parent for path in files("jasper_fast", "bench") if path.name == "__init__.py"]
    assert {room(name_of(folder)) for folder in folders} | {"kernels", "bench.cli", "bench.__main__"} == set(LAYERS)
    assert all(ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) for folder in folders)


def test_there_is_no_circle_of_rooms_or_of_files() -> None:
    for arrows in ({name: below - {""} for name, below in LAYERS.items()}, graph()):
        TopologicalSorter(arrows).prepare()  # raises CycleError for a circle


def test_kernels_import_nothing_above_them() -> None:
    assert faults(files("kernels"), kernels_fault) == set()


def test_nobody_imports_a_mapped_folder_or_a_script_by_its_own_name() -> None:
    assert faults(files("jasper_fast", *MAPPED), package_fault) == set()
    others = [*files("tests"), *ROOT.glob("*.py")]
    assert faults(others, lambda name: name.split(".")[0] in MAPPED) == set(), "import jasper_fast.kernels instead"


@pytest.mark.parametrize(
    ("importer", "imported"),
    [("dispatch.choose", "ops.sync"), ("bench.cases.panes", "bench.gpu.agenda"), ("cli.info", "bench.gpu.agenda")],
)
def test_a_wrong_arrow_is_found(importer: str, imported: str) -> None:
    assert wrong_arrows({f"jasper_fast.{importer}": {f"jasper_fast.{imported}"}}) != []


@pytest.mark.parametrize(
    ("source", "fault", "wrong"),
    [
        ("from jasper_fast.ops import x", kernels_fault, {"jasper_fast.ops.x"}),
        ("from .. import ops", kernels_fault, {"jasper_fast.ops"}),
        ("def f():\n    import rich", kernels_fault, {"rich"}),
        ("import importlib\nimportlib.import_module('jasper_fast.nn.model')", kernels_fault, {"jasper_fast.nn.model"}),
        ("import torch, math\nfrom jasper_fast.kernels import layout", kernels_fault, set()),
        ("from . import philox\nfrom .conv1d import x", kernels_fault, set()),
        ("import bench.cli", package_fault, {"bench.cli"}),
        ("def f():\n    from train import main", package_fault, {"train.main"}),
    ],
)
def test_the_walk_finds_wrong_imports_only(source: str, fault, wrong: set[str]) -> None:
    assert {name for name in imports(source, "jasper_fast.kernels") if fault(name)} == wrong


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, jasper_fast; print(*sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    assert python(code).stdout.split() == []
