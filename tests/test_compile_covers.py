"""The gate compiles what is launched: each kernel of a Jasper 10x5 training step and inference call is one of its rows,
for the same types, alignment, flags, tiles, warps and stages. Launches are recorded and not run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from conftest import interpreted

pytest.importorskip("triton")

import triton
from test_engine_launches import hollow, jasper10x5, unread

from jasper_fast import InferenceEngine, Jasper
from jasper_fast.bench.compile import launches
from jasper_fast.kernels import aot, launch
from jasper_fast.kernels.bn_relu_dropout import triton_impl as bn


@pytest.fixture(autouse=True)
def no_gpu():
    interpreted()  # a GPU is launched on as its own architecture only


@functools.cache
def rows(arch: int, dtype: str) -> set[aot.Source]:
    return {source for _, _, source in launches.recorded(arch, dtype)}


def uncovered(calls: Callable[[], object], arch: int, dtype: str) -> list[str]:
    """The launches of `calls` that are no row, each with what differs from the nearest row."""
    made: set[aot.Source] = set()
    with launch.recorded(lambda one: made.add(aot.source(one, arch)), arch):
        calls()
    assert made, "nothing was launched"
    missing = made - rows(arch, dtype)
    return [f"{source.kernel.__name__}: {nearest(source, rows(arch, dtype))}" for source in missing]


def nearest(source: aot.Source, known: set[aot.Source]) -> list:
    told = lambda s: set(map(repr, [*s.signature.items(), *s.constants.items(), *s.attrs.items(), *s.options.items()]))  # noqa: E731
    same = [told(s) ^ told(source) for s in known if s.kernel is source.kernel]
    return sorted(min(same, key=len, default=()))


@pytest.mark.parametrize(("panes", "masks"), [("gram", True), ("plain", True), ("gram", False)])
@pytest.mark.parametrize(("arch", "dtype"), [(80, "float32"), (80, "bfloat16"), (90, "bfloat16")])
def test_every_launch_of_a_training_step_is_a_row(arch, dtype, panes, masks):
    def step():
        with torch.device("meta"):
            model = Jasper(jasper10x5(masks), backend="triton", panes=panes)
        model.to_empty(device="cpu")
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            log_probs, _ = model(torch.randn(2, 64, 400), torch.tensor([400, 300]))
        log_probs.sum().backward()

    assert not (missing := uncovered(step, arch, dtype)), "\n".join(missing)


@pytest.mark.parametrize(("frames", "masks"), [(1680, True), (200, True), (1680, False)])
@pytest.mark.parametrize(("arch", "dtype"), [(80, "float32"), (80, "float16"), (90, "float16")])
def test_every_launch_of_an_inference_call_is_a_row(arch, dtype, frames, masks, monkeypatch):
    def call():
        engine = InferenceEngine(hollow(jasper10x5(masks), torch.device("cpu")), dtype=getattr(torch, dtype))
        engine(torch.randn(1, 64, frames), torch.tensor([frames]))

    unread(monkeypatch, dense=arch >= 90)
    assert not (missing := uncovered(call, arch, dtype)), "\n".join(missing)


@pytest.mark.parametrize(("first", "missing"), [(0, 0), (8, 0), (1, 1)])
def test_a_launch_of_another_alignment_is_no_row(first, missing):
    """A slice that does not begin at 16 bytes has a kernel of its own."""
    y = torch.zeros(first + 2 * 40 * 256, dtype=torch.float16)[first:].view(2, 40, 256).transpose(1, 2)
    found = uncovered(lambda: bn.stats(y), 80, "float16")
    assert len(found) == missing and all("((0,), [])" in line for line in found)


def test_what_cannot_be_described_is_refused():
    made: list[launch.Launch] = []
    with launch.recorded(made.append):
        bn.stats(torch.zeros(2, 40, 64).transpose(1, 2))
    one, tuned = made[0], triton.autotune([triton.Config({})], key=[])
    for wrong, error in [
        (one._replace(kernel=tuned(one.kernel)), TypeError),
        (one._replace(args=one.args[1:]), TypeError),
        (one._replace(meta=one.meta | {"num_wraps": 4}), KeyError),
        (one._replace(meta=one.meta | {"num_warps": 3}), AssertionError),
    ]:
        with pytest.raises(error):
            aot.source(wrong, 80)
    with pytest.raises(RuntimeError, match="interprets"):
        aot.compile_for(aot.source(one, 80), 80)
