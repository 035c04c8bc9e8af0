"""Every face of an op exports the functions of the op, with the signatures of reference.py."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[1] / "kernels"
OPS = {
    "bn_relu_dropout": ({"stats", "forward", "backward_reduce", "backward_apply"}, ("cpu", "triton", "cuda")),
    "conv1d": ({"forward", "dgrad", "wgrad"}, ("aten", "cpu", "triton", "cuda")),
    "ctc": ({"forward", "backward"}, ("triton",)),
    "depthwise": ({"forward", "dgrad", "wgrad"}, ("aten", "cpu", "triton")),
    "novograd": ({"step"}, ("cpu", "triton", "cuda")),
    "panes": ({"outputs", "forward", "backward_reduce", "gradients"}, ("cpu",)),
    "prefix_beam": ({"search"}, ("cpu", "triton")),
}


def public(op: str, stem: str) -> dict[str, str]:
    """Returns the signatures of a face's public functions, by name. The names of types have no module in front."""
    if stem.startswith("triton"):
        pytest.importorskip("triton")
    package = f"jasper_fast.kernels.{op}"
    found = inspect.getmembers(importlib.import_module(f"{package}.{stem}"), inspect.isroutine)
    own = {name: f for name, f in found if not name.startswith("_") and f.__module__.startswith(package)}
    return {name: re.sub(r"\b([a-z_]\w*\.)+", "", str(inspect.signature(f, eval_str=True))) for name, f in own.items()}


@pytest.mark.parametrize(("op", "face"), [(op, face) for op, (_, faces) in OPS.items() for face in faces])
def test_signatures_equal_the_reference(op, face):
    """`fused` is left out, because the reference takes no packed weights."""
    want, got = public(op, "reference"), public(op, f"{face}_impl")
    assert OPS[op][0] <= got.keys()
    both = (want.keys() & got.keys()) - {"fused"}
    assert {name: got[name] for name in both} == {name: want[name] for name in both}


def test_faces_with_packed_weights_fuse_alike():
    """On the faces that take packed weights, `fused` begins with the same parameters. The faces for GPUs have further
    parameters after them."""
    cpu, triton, cuda = (public("conv1d", f"{face}_impl") for face in ("cpu", "triton", "cuda"))
    assert cuda["fused"] == triton["fused"]
    assert triton["fused"].startswith(cpu["fused"].removesuffix(") -> Tensor"))
    assert cpu["pack_once"] == triton["pack_once"] == cuda["pack_once"]


def test_every_op_is_listed():
    assert {path.parent.name for path in KERNELS.glob("*/reference.py")} == OPS.keys()
    listed = {f"{op}/{face}_impl.py" for op, (_, faces) in OPS.items() for face in faces}
    assert {f"{path.parent.name}/{path.name}" for path in KERNELS.glob("*/*_impl.py")} == listed
