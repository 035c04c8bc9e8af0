"""The compile gate compiles every kernel that a training step or an inference call of Jasper 10x5 launches, with the
same types, alignment, flags, tiles, warps and stages. Launches are recorded and not run."""

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
    interpreted()  # on a GPU, launches exist only for its own architecture


@functools.cache
def rows(arch: int, dtype: str) -> set[aot.Source]:
    return {source for _, _, source in launches.recorded(arch, dtype)}


def uncovered(calls: Callable[[], object], arch: int, dtype: str) -> list[set[str]]:
    """Returns, for each launch of `calls` that has no row in the gate's table, the differences from the most similar
    row of the same kernel."""
    made: set[aot.Source] = set()
    with launch.recorded(lambda one: made.add(aot.source(one, arch)), arch):
        calls()
    assert made, "nothing was launched"
    known = rows(arch, dtype)
    return [
        min((facts(m) ^ facts(s) for s in known if s.kernel is m.kernel), key=len, default=facts(m))
        for m in made - known
    ]


def facts(source: aot.Source) -> set[str]:
    return set(map(repr, [*source.signature.items(), *source.constants.items(), *source.attrs.items()]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "panes", "masks"),
    [
        (80, "float32", "plain", True),
        (80, "float32", "gram", False),
        (80, "bfloat16", "gram", True),
        (90, "bfloat16", "gram", True),
        (90, "bfloat16", "plain", True),
        (90, "bfloat16", "gram", False),
    ],
)
def test_every_launch_of_a_training_step_is_a_row(arch, dtype, panes, masks):
    def step():
        with torch.device("meta"):
            model = Jasper(jasper10x5(masks), backend="triton", panes=panes)
        model = model.to_empty(device="cpu").train()  # allocates the weights; their values do not matter
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            log_probs, _ = model(torch.randn(2, 64, 400), torch.tensor([400, 300]))
        log_probs.sum().backward()

    assert uncovered(step, arch, dtype) == []


@pytest.mark.parametrize(("frames", "masks"), [(1680, True), (200, True), (1680, False)])
@pytest.mark.parametrize(("arch", "dtype"), [(80, "float32"), (80, "float16"), (90, "float16")])
def test_every_launch_of_an_inference_call_is_a_row(arch, dtype, frames, masks, monkeypatch):
    def call():
        engine = InferenceEngine(hollow(jasper10x5(masks), torch.device("cpu")), dtype=getattr(torch, dtype))
        engine(torch.randn(1, 64, frames), torch.tensor([frames]))

    unread(monkeypatch, dense=arch >= 90)
    assert uncovered(call, arch, dtype) == []


@pytest.mark.parametrize(("first", "missing"), [(0, 0), (8, 0), (1, 1)])
def test_a_launch_of_another_alignment_is_no_row(first, missing):
    """Shows that a tensor whose address is not a multiple of 16 needs a kernel of its own, which has no row."""
    y = torch.zeros(first + 2 * 40 * 256, dtype=torch.float16)[first:].view(2, 40, 256).transpose(1, 2)
    found = uncovered(lambda: bn.stats(y), 80, "float16")
    assert len(found) == missing and all("((0,), [])" in differences for differences in found)


def empty(x_ptr, frames):
    """A kernel that does nothing."""


@pytest.mark.parametrize(("given", "kernels"), [([], 3), (["frames"], 1)])
def test_a_length_that_is_specialised_is_seen(given, kernels):
    """Shows that Triton compiles separate kernels for T = 1, for multiples of 16 and for other T. It does not if the
    argument is excluded from specialisation."""
    kernel = triton.jit(empty, do_not_specialize=given)
    assert len({aot.source(launch.Launch(kernel, (1,), (None, t), {}), 90) for t in range(1, 41)}) == kernels


def test_what_cannot_be_described_is_refused():
    made: list[launch.Launch] = []
    with launch.recorded(made.append):
        bn.stats(torch.zeros(2, 40, 64).transpose(1, 2))
    one = made[0]
    # set in each launch, because its default depends on Triton's version
    assert aot.source(one, 80).options["enable_fp_fusion"]
    for wrong, error in [
        (one._replace(kernel=triton.autotune([triton.Config({})], key=[])(one.kernel)), TypeError),
        (one._replace(args=one.args[1:]), TypeError),
        (one._replace(meta=one.meta | {"num_wraps": 4}), KeyError),
        (one._replace(meta=one.meta | {"num_warps": 3}), AssertionError),
    ]:
        with pytest.raises(error):
            aot.source(wrong, 80)
    with pytest.raises(RuntimeError, match="interpreter"):
        aot.compile_for(aot.source(one, 80), 80)
