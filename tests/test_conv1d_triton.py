"""Training convs in Triton (interpreted if there is no GPU), compared with fp64 by the tolerance rule of all tests."""

import pytest
import torch
from close import assert_close
from conftest import assert_raises, make_face, settle
from conv_cases import LAYERS, make, pytorch
from standins import spied, wrap
from torch.nn import functional as F

from jasper_fast.kernels import launch, precision
from jasper_fast.kernels.bn_relu_dropout import reference as bn
from jasper_fast.kernels.conv1d import reference, triton_tiles
from jasper_fast.kernels.layout import empty_ntc, mask, ntc
from jasper_fast.kernels.operands import Geometry, Lengths, Mask, Norm

triton_impl = pytest.importorskip("jasper_fast.kernels.conv1d.triton_impl")


@pytest.mark.parametrize(
    ("c_in", "t", "lengths"),
    [(64, 42, None), (64, 41, None), (64, 41, [41, 40]), (64, 42, [40, 3]), (64, 1, [1, 1]), (24, 42, None)],
)
def test_tensor_descriptors_at_stride_2(c_in, t, lengths, monkeypatch):
    """Shows when stride 2 uses tensor descriptors, and that results stay equal. A row of a descriptor holds two frames,
    so utterances must begin an even number of frames apart. The channels must fill a block, which 24 do not."""
    wrap(monkeypatch, triton_tiles, "choose", lambda right, *a: right(*a)._replace(t=16))
    x, weight, shape, lengths = make((2, c_in, 32, t, 5, 2, 1, lengths), torch.float16, make_face("triton").device)
    if lengths is not None:  # the content of padding must not matter
        x = ntc(mask(x, lengths, torch.nan))
    apart = ntc(x.new_empty(2, c_in, t + t % 2))[:, :, :t].copy_(x)
    dy, w = ntc(torch.randn(2, 32, (t + 1) // 2, device=x.device).to(x.dtype)), triton_impl.pack(weight)
    calls = [
        (lambda: triton_impl.forward(apart, weight, shape, lengths), t > 1),
        (lambda: triton_impl.fused(apart.transpose(1, 2), w, shape, lengths=Lengths(lengths)), t > 1),
        (lambda: triton_impl.forward(x, weight, shape, lengths), t % 2 == 0),
        (lambda: triton_impl.wgrad(x, dy, 5, shape, lengths), t % 2 == 0),
    ]
    plain = [call() for call, _ in calls]
    loads = count_descriptor_loads(monkeypatch)
    monkeypatch.setattr(triton_impl, "INTERPRET_DESCRIPTORS", True)
    for (call, expected), want in zip(calls, plain, strict=True):
        loads.clear()
        assert torch.equal(call(), want)
        assert not want.isnan().any()
        assert x.is_cuda or bool(loads) == (expected and c_in == 64)


def count_descriptor_loads(monkeypatch) -> list:
    """Returns a list to which each load through a tensor descriptor in the interpreter adds an element."""
    from triton.runtime.interpreter import InterpreterBuilder

    return spied(monkeypatch, InterpreterBuilder, "create_descriptor_load", lambda *_: True)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_a_tile_too_wide_for_one_epilogue(descriptors, monkeypatch):
    """Shows that results are right with a tile of 128 x 256, whose epilogue takes one half of the tile at a time."""
    monkeypatch.setattr(triton_impl, "INTERPRET_DESCRIPTORS", descriptors)
    layer = (2, 16, 200, 140, 3, 1, 1, [140, 30])
    x, weight, shape, lengths = make(layer, torch.float16, make_face("triton").device)
    narrow = triton_impl.forward_stats(x, weight, shape, lengths)
    wrap(monkeypatch, triton_tiles, "choose", lambda right, *a: right(*a)._replace(t=128, n=256, num_warps=8))
    y, mean, m2 = triton_impl.forward_stats(x, weight, shape, lengths)
    low, ref = F.conv1d(x, weight, None, *shape), F.conv1d(x.double(), weight.double(), None, *shape)
    assert_close("y", y, low, ref)
    torch.testing.assert_close(mean, narrow[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(m2, narrow[2], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, whose tensor cores round fp32 to TF32")
@pytest.mark.parametrize("name", ["k11", "decoder", "odd channels"])
def test_fp32_is_rounded_to_tf32_where_pytorch_rounds_it(name):
    x, weight, shape, lengths = make(LAYERS[name], torch.float32, make_face("triton").device)
    ref, errors = F.conv1d(x.double(), weight.double(), None, *shape), {}
    for kind in precision.FP32_PRECISIONS:
        with precision.fp32(kind):
            errors[kind] = (triton_impl.forward(x, weight, shape, lengths) - ref).abs().max() / ref.abs().max()
    assert errors["ieee"] <= 2e-6 < 1e-4 < errors["tf32"] <= 4 * 2**-10


def test_errors_name_what_is_wrong():
    settle("triton")
    x, weight, how = ntc(torch.ones(1, 8, 4)), torch.ones(8, 8, 11), Geometry(1, 5)
    assert_raises([
        (lambda: triton_impl.forward(x, weight, Geometry()), "taps span 11"),
        (lambda: triton_impl.dgrad(x, weight, 8, Geometry(2, 5)), "stride 1"),
        (lambda: triton_impl.forward(ntc(torch.ones(1, 4, 4)), weight, how), "4 channels, the weight takes 8"),
        (lambda: triton_impl.forward(ntc(torch.ones(1, 16, 4)), weight, how), "16 channels, the weight takes 8"),
        (lambda: triton_impl.wgrad(x, ntc(torch.ones(1, 8, 5)), 11, how), "does not fit the conv"),
        (lambda: triton_impl.wgrad(torch.ones(1, 8, 4), x, 11, how), "dense in NTC memory"),
    ])  # fmt: skip
    assert_raises([(lambda: triton_impl.forward(x.double(), weight.double(), how), "float64")], TypeError)


@pytest.mark.parametrize(("dtype", "made"), [(torch.float32, torch.float16), (torch.float16, torch.float16)])
def test_pack_is_the_weight_in_the_kernels_order(dtype, made):
    weight = torch.randn(29, 33, 5, device=make_face("triton").device).to(dtype)
    packed = triton_impl.pack(weight, made)
    assert packed.data.shape == (5, 33, 32)
    assert torch.equal(packed.data[:, :, :29], weight.permute(2, 1, 0).to(made))
    assert (packed.data[:, :, 29:] == 0).all()
    buffer = torch.full_like(packed.data, torch.nan)
    assert triton_impl.pack(weight, out=buffer).data is buffer
    assert torch.equal(buffer, packed.data)
    x = ntc(torch.randn(1, 33, 7, device=weight.device).to(made))
    got = triton_impl.forward_stats(x, weight, Geometry(1, 2), None, packed.data)
    assert all(map(torch.equal, got, triton_impl.forward_stats(x, weight.to(made), Geometry(1, 2))))


def test_a_nan_in_a_frame_reaches_g_and_the_sums():
    y, weight, shape, lengths = make(LAYERS["k11"], torch.float16, make_face("triton").device)
    y = ntc(y.abs())  # the batch norm below computes y + 1, so the ReLU lets every gradient pass
    y[0, 3, 20] = torch.nan
    dy = ntc(torch.randn(2, weight.shape[0], y.shape[2], device=y.device).half())
    one, zero = torch.ones(y.shape[1], device=y.device), torch.zeros(y.shape[1], device=y.device)
    norm, zeroed = Norm(zero, one, one, one), Mask(lengths)
    z = bn.forward(y, norm, None, zeroed)
    g, dbeta, dgamma = triton_impl.dgrad_bn(dy, weight, shape, y, z, norm, zeroed)
    assert not g.isnan().any()  # as in PyTorch, the gradient passes where the ReLU's input is NaN
    assert dgamma.isnan().nonzero().flatten().tolist() == [3]
    assert not dbeta.isnan().any()
    dy[0, 5, 9] = torch.inf
    g, dbeta, _ = triton_impl.dgrad_bn(dy, weight, shape, y, z, norm, zeroed)
    assert not g[0, :, 4:15].isfinite().any()
    assert g[1].isfinite().all()
    assert not dbeta.isfinite().any()


# ---- padding costs nothing ----


def test_a_batch_costs_its_frames_and_its_halo(monkeypatch):
    """Shows that no matrix products are computed beyond each utterance's frames and halo."""
    if make_face("triton").device.type == "cuda":
        pytest.skip("products are counted in the interpreter")
    from triton.runtime.interpreter import interpreter_builder as builder

    t, k, how, block = 64, 5, Geometry(1, 2), 16
    short = [t, t // 2, t // 4, 0]
    lengths = torch.tensor(short)
    x, weight = ntc(mask(torch.randn(4, 16, t), lengths)), torch.randn(32, 16, k) / 13
    dy = ntc(torch.randn(4, 32, t))
    monkeypatch.setattr(triton_tiles, "choose", lambda *_: triton_tiles.Tile(block, 16, 16, 4, 2))
    counted = spied(monkeypatch, builder, "create_dot")

    def products(function, *args):
        counted.clear()
        return function(*args), len(counted)

    def tiles(frames):  # tiles of an utterance whose first `frames` frames may be nonzero
        return -(-min(frames, t) // block)

    results, done = products(triton_impl.forward_stats, x, weight, how, lengths)
    assert done == sum(tiles(length + how.padding) if length else 0 for length in short) * 2 * k
    whole, everything = products(triton_impl.forward_stats, x, weight, how)
    assert everything == 4 * (t // block) * 2 * k
    assert all(map(torch.equal, results, whole))

    dx, done = products(triton_impl.dgrad, dy, weight, t, how, lengths)
    assert done == sum(map(tiles, short)) * 2 * k  # C_out = 32 in steps of 16
    whole, _ = products(triton_impl.dgrad, dy, weight, t, how)
    assert torch.equal(dx, mask(whole, lengths))

    dw, done = products(triton_impl.wgrad, x, dy, k, how, lengths)
    rows = sum(
        -(-max(0, min(t, length - shift) - max(0, -shift)) // block) for shift in range(-2, 3) for length in short
    )
    assert done == rows * 2  # C_out = 32 in blocks of 16
    assert_close("dw", dw, triton_impl.wgrad(x, dy, k, how), reference.wgrad(x.double(), dy.double(), k, how))


@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize(
    "layer",
    [(2, 32, 64, 33, 5, 1, 1, [33, 1]), (2, 48, 32, 21, 4, 1, 3, None), (3, 32, 32, 9, 1, 1, 1, [9, 0, 4])],
    ids=str,
)
def test_wgrad_of_two_taps_a_program_and_without_partials(layer, shares, monkeypatch):
    """Shows that two taps share each load of dy, except an odd last tap. A conv of several taps takes one launch if the
    batch is not divided into shares. The gradient of a master weight in fp32 is not rounded to fp16."""
    monkeypatch.setattr(triton_impl, "INTERPRET_DESCRIPTORS", True)
    x, weight, shape, lengths = make(layer, torch.float16, make_face("triton").device)
    k = weight.shape[2]
    dy = ntc(torch.randn(x.shape[0], weight.shape[0], shape.frames(x.shape[2], k), device=x.device).to(x.dtype))
    monkeypatch.setattr(triton_tiles, "choose", lambda *_: triton_tiles.Tile(16, 16, 32, 4, 2, shares))
    seen = []
    with launch.recorded(seen.append):
        triton_impl.wgrad(x, dy, k, shape, lengths, torch.float32, clean=True)
    assert [one.name for one in seen] == ["conv1d_wgrad_kernel", "conv1d_wgrad_merge_kernel"][: shares if k > 1 else 2]
    pairs = 2 if k > 1 else 1
    assert seen[0].arguments["TAPS"] == pairs and seen[0].arguments["IS_DIRECT"] == (shares == 1 and k > 1)
    assert seen[0].grid == (-(-k // pairs) * -(-layer[1] // 16) * -(-layer[2] // 32) * shares,)

    loads = count_descriptor_loads(monkeypatch)
    got = triton_impl.wgrad(x, dy, k, shape, lengths, torch.float32, clean=True)
    both = len(loads)
    ref = pytorch(x, weight, dy, shape, torch.float64)["dw"]
    assert_close("dw", got, ref.float(), ref, factor=4.0)
    assert torch.equal(got, triton_impl.wgrad(x, dy, k, shape, lengths, torch.float32, clean=True))
    assert torch.equal(got.half(), triton_impl.wgrad(x, dy, k, shape, lengths, clean=True))
    monkeypatch.setattr(triton_tiles, "wgrad_taps", lambda *_: 1)
    loads.clear()
    assert_close("dw", triton_impl.wgrad(x, dy, k, shape, lengths, torch.float32, clean=True), got, ref)
    assert x.is_cuda or (both < len(loads) if k == 5 else both <= len(loads))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "descriptors"), [("k11", False), ("prologue", True), ("k11", True), ("pane", True)])
def test_padding_that_is_zero_gives_the_same_bits_as_padding_that_is_masked(name, descriptors, monkeypatch):
    """Compares calls with `clean=True`, as the ops and the engine make them, with calls that mask NaN in padding."""
    monkeypatch.setattr(triton_impl, "INTERPRET_DESCRIPTORS", descriptors)
    x, weight, shape, lengths = make(LAYERS[name], torch.float16, make_face("triton").device)
    k, poisoned = weight.shape[2], ntc(mask(x, lengths, torch.nan))
    y = triton_impl.forward(poisoned, weight, shape, lengths)
    dy = ntc(torch.randn_like(y))
    dw = triton_impl.wgrad(poisoned, dy, k, shape, lengths)
    given = triton_impl.pack(weight), shape
    z = triton_impl.fused(poisoned.transpose(1, 2), *given, lengths=Lengths(lengths))
    assert torch.equal(triton_impl.forward(x, weight, shape, lengths, clean=True), y)
    got = triton_impl.forward_stats(x, weight, shape, lengths, clean=True)
    assert all(map(torch.equal, got, triton_impl.forward_stats(poisoned, weight, shape, lengths)))
    assert torch.equal(triton_impl.fused(x.transpose(1, 2), *given, lengths=Lengths(lengths), clean=True), z)
    got = triton_impl.wgrad(x, dy, k, shape, lengths, clean=True)
    assert_close("dw", got, dw, pytorch(x, weight, dy, shape, torch.float64)["dw"])


@pytest.mark.parametrize(("value", "dtype"), [(torch.nan, torch.float32), (torch.inf, torch.float16)], ids=str)
def test_what_is_not_finite_in_a_frame_reaches_y_and_every_gradient(dtype, value):
    x, weight, shape, lengths = make(LAYERS["k11"], dtype, make_face("triton").device)
    dy = ntc(torch.randn_like(triton_impl.forward(x, weight, shape, lengths)))
    x[0, 3, 20] = value
    y, mean, m2 = triton_impl.forward_stats(x, weight, shape, lengths)
    assert not y[0, :, 15:26].isfinite().any() and y[0, :, :15].isfinite().all() and y[1].isfinite().all()
    assert not mean.isfinite().any() and not m2.isfinite().any()
    dw = triton_impl.wgrad(x, dy, 11, shape, lengths)
    assert not dw[:, 3].isfinite().any()
    assert dw[:, :3].isfinite().all() and dw[:, 4:].isfinite().all()
    dy[0, 5, 9] = value
    dx = triton_impl.dgrad(dy, weight, x.shape[2], shape, lengths)
    assert not dx[0, :, 4:15].isfinite().any() and dx[0, :, 15:].isfinite().all() and dx[1].isfinite().all()
    assert not triton_impl.wgrad(ntc(torch.ones_like(x)), dy, 11, shape, lengths)[5].isfinite().any()


# ---- what is refused before any launch: utterances beyond 32-bit offsets, a workspace on another device ----

# These tests use tensors on the meta device, which have sizes and strides but no memory.
HALF = torch.float16
TOO_LONG = "exceeds 32-bit offsets: cut it into shorter ones"
FRAMES = 1 << 22  # with 512 channels an utterance has 2^31 elements
PACK = triton_impl.Packed(torch.empty(1, 16, 16, dtype=HALF, device="meta"), 16, 16, 1)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Records the names of launches instead of running them."""
    names: list[str] = []
    monkeypatch.setattr(launch, "run", lambda kernel, *args, **meta: names.append(kernel.__name__))
    return names


def made(n: int, c: int, t: int) -> torch.Tensor:
    return empty_ntc(n, c, t, like=torch.empty(0, dtype=HALF, device="meta"))


def weight(c_out: int, c_in: int, taps: int = 1) -> torch.Tensor:
    return torch.empty(c_out, c_in, taps, dtype=HALF, device="meta")


def test_an_output_wider_than_its_input_is_refused_where_it_alone_is_too_long(launched):
    packed = torch.empty(triton_impl.packed_shape(weight(528, 16)), dtype=HALF, device="meta")
    narrow, wide, how = made(1, 16, FRAMES), made(1, 528, FRAMES), Geometry()
    assert_raises([
        (lambda: triton_impl.forward(narrow, weight(528, 16), how, packed=packed), TOO_LONG),
        (lambda: triton_impl.wgrad(narrow, wide, 1, how), TOO_LONG),
        (lambda: triton_impl.dgrad(wide, weight(528, 16), FRAMES, how, packed=packed), TOO_LONG),
    ])  # fmt: skip
    assert not launched


def test_many_utterances_may_be_longer_than_that_together(launched):
    triton_impl.wgrad(made(8, 16, FRAMES // 4), made(8, 528, FRAMES // 4), 1, Geometry())
    assert "conv1d_wgrad_kernel" in launched


@pytest.mark.parametrize("place", ["x", "x2", "out"])
def test_a_slice_of_a_wide_history_buffer_is_judged_by_its_strides(launched, place):
    """The slice has few elements, 16 of 1024 channels, but they are far apart in memory."""
    frames = (1 << 21) + 1
    history = torch.empty(1, frames, 1024, dtype=HALF, device="meta")[:, :, :16]
    given = {name: torch.empty(1, frames, 16, dtype=HALF, device="meta") for name in ("x", "x2", "out")}

    def call(frames: int) -> None:
        cut = {name: x[:, :frames] for name, x in (given | {place: history}).items()}
        triton_impl.fused(cut["x"], PACK, Geometry(), panes=(cut["x2"], PACK), out=cut["out"])

    with pytest.raises(ValueError, match=TOO_LONG):
        call(frames)
    assert not launched
    call(frames - 1)  # with one frame less, all offsets fit into 32 bits
    assert launched == ["conv1d_fused_kernel"]


def test_a_workspace_of_another_device_is_refused(launched):
    x = torch.empty(1, 9, 16, dtype=HALF, device="meta")
    with pytest.raises(ValueError, match="the workspace is on cpu, x on meta: make one for each device"):
        triton_impl.fused(x, PACK, Geometry(), workspace=triton_impl.Workspace("cpu"))
    assert not launched
    triton_impl.fused(x, PACK, Geometry(), workspace=triton_impl.Workspace("meta"))
    assert launched == ["conv1d_fused_kernel"]
