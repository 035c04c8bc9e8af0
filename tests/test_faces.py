"""Every face of an op exports the same functions with the same signatures; read from source, so nothing is imported."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
OPS = sorted(path.parent.name for path in KERNELS.glob("*/reference.py"))
FACES = sorted(path for path in KERNELS.glob("*/*_impl.py"))


def public(path: Path) -> dict[str, str]:
    """Signatures of the public functions of a file, as source."""
    tree = ast.parse(path.read_text())
    return {f.name: ast.unparse(f.args) for f in tree.body if isinstance(f, ast.FunctionDef) and f.name[0] != "_"}


@pytest.mark.parametrize("path", FACES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_signatures_equal_the_reference(path):
    want = public(path.parent / "reference.py")
    got = public(path)
    shared = {name: got[name] for name in want if name in got}
    assert shared, f"{path} has none of {sorted(want)}"
    assert shared == {name: want[name] for name in shared}


def test_every_face_of_bn_relu_dropout_is_whole():
    folder = KERNELS / "bn_relu_dropout"
    names = {"stats", "forward", "backward_reduce", "backward_apply"}
    for stem in ("reference", "cpu_impl", "triton_impl", "cuda_impl"):
        assert names <= public(folder / f"{stem}.py").keys(), stem


def test_ops_are_found():
    assert "bn_relu_dropout" in OPS
