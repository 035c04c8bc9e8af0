"""conv1d in Triton (interpreted where there is no GPU) against fp64, next to PyTorch at the same precision."""

from __future__ import annotations

import pytest
import torch
from close import assert_close
from conftest import compile_rows, make_face
from torch.nn import functional as F

from jasper_fast.kernels.conv1d import reference
from jasper_fast.kernels.layout import ntc

triton_impl = pytest.importorskip("jasper_fast.kernels.conv1d.triton_impl")

# (N, C_in, C_out, T, K, stride, dilation, lengths): every layer of Jasper 10x5 at C <= 64, and the edges
LAYERS = {
    "prologue": (2, 64, 32, 45, 11, 2, 1, [45, 20]),
    "k11": (2, 32, 32, 37, 11, 1, 1, [37, 9]),
    "k13": (2, 32, 48, 33, 13, 1, 1, [33, 1]),
    "k17": (1, 48, 64, 40, 17, 1, 1, [26]),
    "k21": (2, 64, 48, 21, 21, 1, 1, [0, 21]),
    "k25": (1, 64, 64, 50, 25, 1, 1, [50]),
    "dilated": (2, 64, 56, 41, 29, 1, 2, [41, 30]),
    "pane": (3, 24, 40, 35, 1, 1, 1, [35, 11, 0]),
    "decoder": (2, 64, 29, 19, 1, 1, 1, None),
    "one frame": (2, 40, 56, 1, 11, 1, 1, [1, 1]),
    "odd channels": (2, 33, 30, 70, 5, 1, 2, [70, 33]),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def layer(request):
    return request.param


def make(layer, dtype, device):
    n, c_in, c_out, t, k, stride, dilation, lengths = layer
    x = torch.randn(n, c_in, t)
    if lengths is not None:
        lengths = torch.tensor(lengths)
        x = x.masked_fill((torch.arange(t) >= lengths[:, None])[:, None], 0.0)
        lengths = lengths.to(device)
    weight = (torch.randn(c_out, c_in, k) / (c_in * k) ** 0.5).to(device, dtype)
    return ntc(x.to(device, dtype)), weight, stride, dilation * (k - 1) // 2, dilation, lengths


def gradients(x, weight, dy, stride, padding, dilation):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    F.conv1d(x, weight, None, stride, padding, dilation).backward(dy)
    return x.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_three_directions(layer, dtype):
    check(layer, dtype)


@pytest.mark.parametrize("name", ["k11", "pane", "one frame"])
def test_three_directions_in_bf16(name):
    check(LAYERS[name], torch.bfloat16)


@pytest.mark.parametrize("name", ["k11", "k21", "k25", "dilated", "decoder"])
def test_three_directions_through_tensor_descriptors(name, monkeypatch):
    monkeypatch.setattr(triton_impl, "INTERPRET_DESCRIPTORS", True)
    _, c_in, _, t, *_ = LAYERS[name]
    x, weight, *_, lengths = make(LAYERS[name], torch.float16, make_face("triton").device)
    if not x.is_cuda:
        tile = triton_impl.conv_tile(x.dtype, c_in, weight.shape[0], t)
        assert triton_impl._descriptors(x.transpose(1, 2), triton_impl.pack(weight), 1, tile)[0] is not None
    check(LAYERS[name], torch.float16)
    if lengths is not None:  # padding may hold anything
        x = ntc(x.masked_fill((torch.arange(t, device=x.device) >= lengths[:, None])[:, None], torch.nan))
        assert not triton_impl.forward(x, weight, 1, weight.shape[2] // 2, 1, lengths).isnan().any()


def check(layer, dtype):
    device = make_face("triton").device
    x, weight, *shape, lengths = make(layer, dtype, device)
    y = triton_impl.forward(x, weight, *shape, lengths)
    low, ref = F.conv1d(x, weight, None, *shape), F.conv1d(x.double(), weight.double(), None, *shape)
    assert_close("y", y, low, ref)
    dy = ntc(torch.randn_like(ref).to(dtype))
    low, ref = gradients(x, weight, dy, *shape), gradients(x.double(), weight.double(), dy.double(), *shape)
    dw = triton_impl.wgrad(x, dy, weight.shape[2], *shape, lengths)
    assert_close("dw", dw, low[1], ref[1])
    if shape[0] == 1:
        dx = triton_impl.dgrad(dy, weight, x.shape[2], *shape, lengths)
        if lengths is not None:
            padding = (torch.arange(x.shape[2], device=device) >= lengths[:, None])[:, None]
            assert (dx.masked_select(padding) == 0).all()
            low, ref = ([g[0].masked_fill(padding, 0.0)] for g in (low, ref))
        assert_close("dx", dx, low[0], ref[0])


@pytest.mark.parametrize("name", ["prologue", "k13", "decoder", "odd channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_statistics_of_the_accumulators(name, dtype):
    x, weight, *shape, lengths = make(LAYERS[name], dtype, make_face("triton").device)
    y, got_mean, got_m2 = triton_impl.forward_stats(x, triton_impl.pack(weight), *shape, lengths)
    assert torch.equal(y, triton_impl.forward(x, weight, *shape, lengths))
    ref = F.conv1d(x.double(), weight.double(), None, *shape)
    rows = ref.shape[0] * ref.shape[2]
    var, mean = torch.var_mean(ref, (0, 2), correction=0)
    assert ((got_mean - mean).abs() / (var + mean.square()).sqrt()).max() <= 1e-5
    assert ((got_m2 - var * rows).abs() / ((var + 1e-3 * mean.square()) * rows)).max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("layer", "width"), [("k13", 72), ("one frame", 20), ("odd channels", 37)])
def test_fused_with_panes_over_a_history_buffer(layer, width, dtype):
    """Panes read the first channels of a wider buffer, the output is a slice of it, whatever lies beyond is NaN."""
    device = make_face("triton").device
    x, weight, *shape, lengths = make(LAYERS[layer], dtype, device)
    n, c_out, t = x.shape[0], weight.shape[0], x.shape[2]
    names = dict(zip(("stride", "padding", "dilation"), shape, strict=True))
    history = torch.full((n, t, width + c_out + 8), torch.nan, device=device, dtype=dtype)
    inside = (torch.arange(t, device=device) < lengths[:, None])[:, :, None]
    history[:, :, :width] = torch.randn(n, t, width).to(device, dtype).where(inside, torch.nan)
    panes, out = history[:, :, :width], history[:, :, width : width + c_out]
    w2, bias = (torch.randn(c_out, width, 1) / width**0.5).to(device, dtype), torch.randn(c_out, device=device)
    given = {"in_lengths": lengths, "bias": bias, "relu": True, "out_lengths": lengths}

    def plain(dtype):
        return reference.fused(
            x.transpose(1, 2).to(dtype), weight.to(dtype), **names, **given | {"bias": bias.to(dtype)},
            x2=panes.to(dtype), weight2=w2.to(dtype),
        )  # fmt: skip

    low, ref = plain(dtype), plain(torch.float64)
    got = triton_impl.fused(
        x.transpose(1, 2), triton_impl.pack(weight), **names, **given,
        x2=panes, packed2=triton_impl.pack(w2), out=out,
    )  # fmt: skip
    assert got.data_ptr() == out.data_ptr()
    assert_close("z", got, low, ref)
    assert (got.masked_select(~inside) == 0).all()
    assert history[:, :, width + c_out :].isnan().all()


def test_nan_in_padding_is_not_read_and_in_a_frame_arrives():
    device = make_face("triton").device
    x, weight, *shape, lengths = make(LAYERS["k11"], torch.float32, device)
    clean = triton_impl.forward(x, weight, *shape, lengths)
    dirty = x.clone()
    dirty[1, :, int(lengths[1]) :] = torch.nan
    assert torch.equal(triton_impl.forward(ntc(dirty), weight, *shape, lengths), clean)
    dy = ntc(torch.randn_like(clean))
    k = weight.shape[2]
    assert torch.equal(
        triton_impl.wgrad(ntc(dirty), dy, k, *shape, lengths), triton_impl.wgrad(x, dy, k, *shape, lengths)
    )
    dirty[0, 3, 20] = torch.nan
    y = triton_impl.forward(ntc(dirty), weight, *shape, lengths)
    assert y[0, :, 15:26].isnan().all()
    assert not y[1].isnan().any()


def test_wgrad_adds_its_shares_in_a_fixed_order():
    device = make_face("triton").device
    x, weight, *shape, lengths = make((5, 16, 16, 9, 3, 1, 1, [9, 1, 0, 4, 9]), torch.float32, device)
    dy = ntc(torch.randn(5, 16, 9, device=device))
    first = triton_impl.wgrad(x, dy, 3, *shape, lengths)
    assert torch.equal(first, triton_impl.wgrad(x, dy, 3, *shape, lengths))
    low = gradients(x, weight, dy, *shape)[1]
    assert_close("dw", first, low, gradients(x.double(), weight.double(), dy.double(), *shape)[1])


def test_errors_name_what_is_wrong():
    x, weight = ntc(torch.ones(1, 8, 4)), torch.ones(8, 8, 11)
    with pytest.raises(ValueError, match="fewer than 11"):
        triton_impl.forward(x, weight, 1, 0, 1)
    with pytest.raises(ValueError, match="stride 1"):
        triton_impl.dgrad(x, weight, 8, 2, 5, 1)
    with pytest.raises(TypeError, match="float64"):
        triton_impl.forward(x.double(), weight.double(), 1, 5, 1)


def test_compiles_ahead_of_time_for_tensor_cores():
    """Every kernel for sm_80 to sm_100, no GPU needed: matrix instructions, asynchronous copies, no spill."""
    rows = compile_rows("conv1d", "80,90", "float16") + compile_rows("conv1d", "90", "float32")
    rows += compile_rows("conv1d", "86,89,100", "bfloat16", "forward stats", "fused panes", "wgrad")
    assert len(rows) == 27
    for row in rows:
        assert row["spilled"] == 0, row
        assert row["mma"] > 0, row
        if row["arch"] >= 90 and row["dtype"] != "float32" and row["kernel"] != "wgrad":
            assert row["tma"] > 0, row
        else:
            assert row["cp_async"] > 0, row
        assert row["narrow_loads"] == 0, row
        assert row["wide_stores"] > 0, row
        assert row["shared"] <= 100 * 1024, row
