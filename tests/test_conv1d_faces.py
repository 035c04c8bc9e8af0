"""The conv's kernels in every direction and at inference, on every layer shape of Jasper 10x5 with few channels.

The self-check supplies the inputs and the results of plain PyTorch and of fp64. The tolerance is that of the tests.
"""

import pytest
import torch
from close import assert_close
from conftest import make_face

from jasper_fast.dispatch import backends
from jasper_fast.selfcheck.cases import case
from jasper_fast.selfcheck.checks import CONV, UNCLEAN, Check, Conv

# (C_in, C_out, K, stride, dilation) of the 13 distinct main convs. Channels are divided by 16, except the 64 of the
# features, which become 16, and the 29 of the output.
LAYERS = {
    "prologue": (16, 16, 11, 2, 1),
    "block 1": (16, 16, 11, 1, 1),
    "block 3, first": (16, 24, 13, 1, 1),
    "block 3": (24, 24, 13, 1, 1),
    "block 5, first": (24, 32, 17, 1, 1),
    "block 5": (32, 32, 17, 1, 1),
    "block 7, first": (32, 40, 21, 1, 1),
    "block 7": (40, 40, 21, 1, 1),
    "block 9, first": (40, 48, 25, 1, 1),
    "block 9": (48, 48, 25, 1, 1),
    "epilogue, dilated": (48, 56, 29, 1, 2),
    "epilogue, 1x1": (56, 64, 1, 1, 1),
    "decoder": (64, 29, 1, 1, 1),
}
# (N, T). In a batch of three, the second utterance is a third as long as the first, and the third is empty.
BATCHES = {"odd T": (3, 45), "shorter than the halo": (2, 9), "one frame": (4, 1), "one utterance": (1, 70)}
ODD = {"odd channels": Conv(2, 70, 33, 30, 5, 1, 2), "more channels than frames": Conv(3, 37, 137, 29, 3)}
SHAPES = ODD | {
    f"{layer}, {batch}": Conv(*size, c_in, c_out, *rest)
    for layer, (c_in, c_out, *rest) in LAYERS.items()
    for batch, size in BATCHES.items()
}
# Triton's interpreter is slow, so a pair of a layer and a batch has one dtype. Each layer and each batch gets both.
INTERPRETED = [(name, dtype) for name in ODD for dtype in ("float32", "float16")] + [
    (f"{layer}, {batch}", ("float32", "float16")[(i + j) % 2])
    for i, layer in enumerate(LAYERS)
    for j, batch in enumerate(BATCHES)
]


def is_large(name: str) -> bool:
    shape = SHAPES[name]
    return shape.c_in * shape.c_out * shape.k > 10_000


def assert_right(name: str, shape: Conv, dtype: str, functions: tuple[str, ...] = CONV) -> None:
    """Checks these functions of the face `name`, and `fused`. The padding holds NaN, which no kernel may read."""
    face, impl = make_face(name), backends.face("conv1d", name)
    unclean = UNCLEAN if name == "triton" else ""
    functions = [f for f in functions if hasattr(impl, f) and (shape.stride == 1 or not f.startswith("dgrad"))]
    drawn = {f: Check("conv1d", name, f, "test", shape, dtype, unclean) for f in functions}
    variant = f"{'panes' if shape.stride == 1 else 'plain'} {unclean}".strip()
    drawn["fused"] = Check("conv1d.fused", name, "fused", "test", shape, dtype, variant)
    for function, check in drawn.items():
        found = case(check, face.device, 1)
        got, low, ref = found.ours(), found.low(), found.reference()
        # PyTorch's error in fp32 may by chance be small, so the factor is 4 there. The CPU face's `fused` multiplies
        # sums of four operands, which adds rounding errors.
        factor = 6.0 if (name, function) == ("cpu", "fused") else 4.0 if dtype == "float32" else 2.0
        for key in ref:
            # PyTorch 2.13's own bf16 weight gradient is wrong at one frame and stride 2: it reads uninitialised memory
            theirs = low[key] if low[key].isfinite().all() else ref[key].to(low[key].dtype)
            assert_close(f"{key} of {function}", got[key], theirs, ref[key], factor)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_cpu(name, dtype):
    assert_right("cpu", SHAPES[name], dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param(*of, marks=[pytest.mark.slow] if is_large(of[0]) else []) for of in INTERPRETED],
)
def test_triton(name, dtype):
    # forward and dgrad run the kernels of forward_stats and dgrad_bn with a shorter epilogue, so fp16 suffices for them
    functions = CONV if dtype == "float16" else ("forward_stats", "dgrad_bn", "wgrad")
    assert_right("triton", SHAPES[name], dtype, functions)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block 1", "epilogue, dilated", "epilogue, 1x1"])
def test_triton_in_bf16(name):
    assert_right("triton", SHAPES[f"{name}, odd T"], "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["block 1", "block 9", "prologue", "epilogue, dilated", "decoder"])
def test_triton_through_tensor_descriptors(name, monkeypatch):
    impl = pytest.importorskip("jasper_fast.kernels.conv1d.triton_impl")
    monkeypatch.setattr(impl, "INTERPRET_DESCRIPTORS", True)
    x = torch.empty(3, 45, 64, dtype=torch.float16, device=make_face("triton").device)
    assert impl._activations(x, 1, 32, 16) is not None or x.is_cuda
    (c_in, c_out, *rest), (n, t) = LAYERS[name], BATCHES["odd T"]
    assert_right("triton", Conv(n, t, 64 if c_in < 64 else c_in, c_out, *rest), "float16")
