"""Arrows of import run one way: train, bench, tests -> jasper_fast -> jasper_fast.kernels -> the native libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS_MAY = {"torch", "triton", "numpy"} | sys.stdlib_module_names
PRIVATE_MAY_NOT = {"bench", "tests", "train", "conftest", "close"}


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"no Python files in {folders}"
    return found


def imports(source: str, package: str) -> set[str]:
    """Absolute dotted names that `source`, a module in `package`, imports, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names.add(node.args[0].value)
    return names


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parent.parts
    return ".".join(("jasper_fast", *parts) if parts and parts[0] == "kernels" else parts)


def kernels_fault(name: str) -> bool:
    return name.split(".")[0] not in KERNELS_MAY and not name.startswith("jasper_fast.kernels.")


def package_fault(name: str) -> bool:
    return name.split(".")[0] in PRIVATE_MAY_NOT


@pytest.mark.parametrize("path", files("kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_import_nothing_above_them(path: Path) -> None:
    faults = {name for name in imports(path.read_text(), package_of(path)) if kernels_fault(name)}
    assert not faults, f"{path} imports {sorted(faults)}"


@pytest.mark.parametrize("path", files("jasper_fast"), ids=lambda p: str(p.relative_to(ROOT)))
def test_package_does_not_import_scripts(path: Path) -> None:
    faults = {name for name in imports(path.read_text(), package_of(path)) if package_fault(name)}
    assert not faults, f"{path} imports {sorted(faults)}"


# What each room of the package may import, beside itself and `jasper_fast` itself; "" is the package's own files.
LAYERS = {
    "speech": set(),
    "data": {"speech"},
    "kernels": set(),
    "dispatch": {"kernels"},
    "ops": {"dispatch", "kernels"},
    "nn": {"ops", "dispatch", "kernels"},
    "selfcheck": {"ops", "dispatch", "kernels"},
    "training": {"nn", "data", "speech"},
    "inference": {"nn", "data", "speech", "ops", "dispatch", "kernels"},
    "cli": {"inference", "selfcheck", "nn", "data", "speech", "dispatch", "kernels"},
    "demo": {"inference", "training", "nn", "data", "speech", "ops", "dispatch", "kernels"},
    "": {"cli"},
}

BELOW_ALL = {"jasper_fast", "jasper_fast.extras", "jasper_fast.options"}  # these import nothing of ours


def modules() -> dict[str, Path]:
    """Every module of the package, by its name: kernels/ lies beside it in a checkout."""
    named = {}
    for path in files("jasper_fast", "kernels"):
        parts = (*(("jasper_fast",) if path.is_relative_to(ROOT / "kernels") else ()), *path.relative_to(ROOT).parts)
        name = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        named[name] = path
    return named


def graph(named: dict[str, Path]) -> dict[str, set[str]]:
    """Which modules each module imports: `from package import name` is one of the package where `name` is no module."""
    found = {}
    for name, path in named.items():
        targets = set()
        for target in imports(path.read_text(), package_of(path)):
            while target and target not in named:
                target = target.rpartition(".")[0]
            targets |= {target} if target else set()
        found[name] = targets - {name, *BELOW_ALL}
    return found


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A circle among the arrows, the first name again at the end; empty where there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(arrows.get(name, ())):
            if found := walk(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


def room(module: str) -> str:
    """The room of a module of the package: the folder below `jasper_fast`, "" for the package's own files."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else ""


def test_rooms_import_only_the_rooms_below_them() -> None:
    wrong = {
        f"{name} -> {target}"
        for name, targets in graph(modules()).items()
        for target in targets
        if room(target) not in LAYERS[room(name)] | {room(name)}
    }
    assert not wrong, f"arrows against the table of layers: {sorted(wrong)}"


def test_every_room_is_in_the_table() -> None:
    folders = {path.name for path in (ROOT / "jasper_fast").iterdir() if (path / "__init__.py").is_file()}
    assert folders | {"kernels", ""} == set(LAYERS)


def test_there_is_no_circle_of_rooms_or_of_files() -> None:
    assert circle({name: below - {""} for name, below in LAYERS.items()}) == []
    assert circle(graph(modules())) == []


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_nobody_imports_kernels_by_its_folder_name() -> None:
    paths = [*files("kernels", "jasper_fast", "bench", "tests"), *ROOT.glob("*.py")]
    faults = {
        str(path.relative_to(ROOT))
        for path in paths
        if any(name.split(".")[0] == "kernels" for name in imports(path.read_text(), package_of(path)))
    }
    assert not faults, f"import jasper_fast.kernels instead: {sorted(faults)}"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from jasper_fast.ops import x", kernels_fault),
        ("from .. import ops", kernels_fault),
        ("def f():\n    import rich", kernels_fault),
        ("import importlib\nimportlib.import_module('jasper_fast.nn.model')", kernels_fault),
        ("import bench.harness", package_fault),
        ("def f():\n    from train import main", package_fault),
    ],
)
def test_the_walk_sees_wrong_arrows(source: str, fault) -> None:
    assert any(fault(name) for name in imports(source, "jasper_fast.kernels"))


def test_the_walk_lets_right_arrows_pass() -> None:
    source = "import torch, math\nfrom jasper_fast.kernels import layout\nfrom . import philox\nfrom .conv1d import x"
    assert not any(map(kernels_fault, imports(source, "jasper_fast.kernels")))


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, jasper_fast; print(*sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
