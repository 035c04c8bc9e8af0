"""The gate compiles what is launched: each kernel of a Jasper 10x5 training step and inference call is one of its rows.

Launches are recorded and not run, with the pointers of sm_80 and with the tensor descriptors of sm_90.
"""

from __future__ import annotations

import pytest
import torch
from conftest import make_face

pytest.importorskip("triton")

from test_engine_launches import hollow, jasper10x5

from jasper_fast import InferenceEngine, Jasper
from jasper_fast.bench.compile import gate
from jasper_fast.kernels import launch
from jasper_fast.kernels.conv1d import triton_impl

# PRECISION and UPCAST say how this machine interprets; the number of programs that share work is no constant
OWN = ("PRECISION", "UPCAST")


def launch_key(name: str, constants: dict, num_warps: int, num_stages: int) -> tuple:
    """What a kernel is compiled for, but its dtypes."""
    kept = {k: v for k, v in constants.items() if k.isupper() and len(k) > 1 and k not in OWN}
    return (name, tuple(sorted((k, int(v)) for k, v in kept.items())), num_warps, num_stages)


@pytest.fixture
def launched(monkeypatch) -> set[tuple]:
    """The keys of all launches, none of which happens."""
    if make_face("triton").device.type == "cuda":
        pytest.skip("on a GPU its own architecture decides: this is for those that are not here")
    seen: set[tuple] = set()

    def run(kernel, grid, like, *args, **meta):
        seen.add(launch_key(kernel.__name__, meta, meta.get("num_warps", 4), meta.get("num_stages", 3)))

    monkeypatch.setattr(launch, "run", run)
    return seen


def rows(arch: int, dtype: str) -> set[tuple]:
    """The same of the gate's rows."""
    return {
        launch_key(
            s.kernel.__name__,
            {k: v for k, v in s.constants.items() if k in s.kernel.arg_names},
            s.num_warps,
            s.num_stages,
        )
        for _, _, s in gate._launches(arch, dtype)
    }


def uncovered(seen: set[tuple], arch: int, dtype: str) -> list[str]:
    known = rows(arch, dtype)
    assert seen, "nothing was launched"
    return [f"{key}\nnearest: {nearest(key, known)}" for key in sorted(seen - known)]


def nearest(key: tuple, known: set[tuple]) -> list:
    same = [k for k in known if k[0] == key[0]]
    best = min(same, key=lambda k: len(set(k[1]) ^ set(key[1])), default=None)
    return best and sorted(set(best[1]) ^ set(key[1])) + [best[2:], key[2:]]


@pytest.mark.parametrize(("panes", "masks"), [("gram", True), ("plain", True), ("gram", False)])
@pytest.mark.parametrize(("arch", "dtype"), [(80, "float32"), (80, "bfloat16"), (90, "bfloat16")])
def test_every_launch_of_a_training_step_is_a_row(arch, dtype, panes, masks, launched, monkeypatch):
    monkeypatch.setattr(triton_impl, "INTERPRET_DESCRIPTORS", arch >= 90)
    model = Jasper(jasper10x5(masks), backend="triton", panes=panes).train()
    features, lengths = torch.randn(2, 64, 400), torch.tensor([400, 300])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        log_probs, _ = model(features, lengths)
    log_probs.sum().backward()
    assert not (missing := uncovered(launched, arch, dtype)), "\n".join(missing)


@pytest.mark.parametrize(("frames", "masks"), [(1680, True), (200, True), (1680, False)])
@pytest.mark.parametrize(("arch", "dtype"), [(80, "float32"), (80, "float16"), (90, "float16")])
def test_every_launch_of_an_inference_call_is_a_row(arch, dtype, frames, masks, launched, monkeypatch):
    monkeypatch.setattr(triton_impl, "INTERPRET_DESCRIPTORS", arch >= 90)

    def pack(weight, dtype=None):  # 333 M parameters are not needed to see launches
        data = torch.empty((), dtype=dtype or weight.dtype).expand(triton_impl.packed_shape(weight))
        return triton_impl.Packed(data.contiguous() if arch >= 90 else data, *weight.shape)

    monkeypatch.setattr(triton_impl, "pack", pack)
    engine = InferenceEngine(hollow(jasper10x5(masks), torch.device("cpu")), dtype=getattr(torch, dtype))
    engine(torch.randn(1, 64, frames), torch.tensor([frames]))
    assert not (missing := uncovered(launched, arch, dtype)), "\n".join(missing)
