"""Arrows of import run one way: train, jasper_fast.bench, tests -> jasper_fast -> jasper_fast.kernels -> libraries."""

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
    return ".".join(("jasper_fast", *parts) if parts and parts[0] in ("kernels", "bench") else parts)


def kernels_fault(name: str) -> bool:
    return name.split(".")[0] not in KERNELS_MAY and not name.startswith("jasper_fast.kernels.")


def package_fault(name: str) -> bool:
    of_bench = name.startswith("jasper_fast.bench") and not name.startswith("jasper_fast.bench.cli")
    return of_bench or name.split(".")[0] in PRIVATE_MAY_NOT


@pytest.mark.parametrize("path", files("kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_import_nothing_above_them(path: Path) -> None:
    faults = {name for name in imports(path.read_text(), package_of(path)) if kernels_fault(name)}
    assert not faults, f"{path} imports {sorted(faults)}"


@pytest.mark.parametrize("path", files("jasper_fast"), ids=lambda p: str(p.relative_to(ROOT)))
def test_package_does_not_import_scripts(path: Path) -> None:
    faults = {name for name in imports(path.read_text(), package_of(path)) if package_fault(name)}
    assert not faults, f"{path} imports {sorted(faults)}"


@pytest.mark.parametrize("folder", ["kernels", "bench"])
def test_nobody_imports_a_mapped_folder_by_its_own_name(folder: str) -> None:
    paths = [*files("kernels", "jasper_fast", "bench", "tests"), *ROOT.glob("*.py")]
    faults = {
        str(path.relative_to(ROOT))
        for path in paths
        if any(name.split(".")[0] == folder for name in imports(path.read_text(), package_of(path)))
    }
    assert not faults, f"import jasper_fast.{folder} instead: {sorted(faults)}"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from jasper_fast.ops import x", kernels_fault),
        ("from .. import ops", kernels_fault),
        ("def f():\n    import rich", kernels_fault),
        ("import importlib\nimportlib.import_module('jasper_fast.model')", kernels_fault),
        ("import bench.cli", package_fault),
        ("from jasper_fast.bench.harness import case", package_fault),
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
