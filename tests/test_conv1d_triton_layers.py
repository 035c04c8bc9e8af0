"""Every layer shape of Jasper 10x5, channels divided by 16, through every Triton kernel, on batches with awkward edges.

Training: batch norm, ReLU, dropout and mask of y, the conv with its statistics, and all gradients back to y. Inference:
the folded conv with panes. Against fp64, next to plain PyTorch in the same precision.
"""

from __future__ import annotations

import pytest
import torch
from close import assert_close
from conftest import make_face
from conv_cases import make
from torch.nn import functional as F

from jasper_fast.kernels import philox
from jasper_fast.kernels.conv1d import reference
from jasper_fast.kernels.layout import mask, ntc, padding
from jasper_fast.kernels.operands import Lengths, Mask, Norm

triton_impl = pytest.importorskip("jasper_fast.kernels.conv1d.triton_impl")
from jasper_fast.kernels.bn_relu_dropout import triton_impl as triton_bn  # noqa: E402

# (C_in, C_out, K, stride, dilation) of the 13 distinct main convs
SHAPES = {
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
# (T, lengths)
BATCHES = {
    "odd T": (45, [45, 23, 1]),
    "shorter than the halo": (9, [9, 0]),
    "one frame": (1, [1, 1]),
    "one utterance": (70, [67]),
}
P = 0.2


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request):
    return request.param


@pytest.fixture(params=BATCHES.values(), ids=BATCHES.keys())
def batch(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16], ids=["fp32", "fp16"])
def dtype(request):
    return request.param


def layer(shape, batch):
    (c_in, c_out, k, stride, dilation), (t, lengths) = shape, batch
    return len(lengths), c_in, c_out, t, k, stride, dilation, lengths


def test_training(shape, batch, dtype):
    device = make_face("triton").device
    _, weight, geometry, lengths = make(layer(shape, batch), dtype, device)
    (n, c, k), t = (len(batch[1]), shape[0], shape[2]), batch[0]
    vectors = torch.randn(c) * 0.1, torch.rand(c) + 0.5, torch.rand(c) + 0.5, torch.randn(c) * 0.5
    mean, rstd, gamma, beta = (v.to(device) for v in vectors)
    y, seed = torch.randn(n, c, t, device=device), torch.tensor([7], device=device)
    norm, zeroed = Norm(mean, rstd, gamma, beta), Mask(lengths, seed, P)
    pre = (y - mean[:, None]) * (gamma * rstd)[:, None] + beta[:, None]
    y = y.where(pre.abs() > 0.02, mean[:, None] + 3)  # off the ReLU's edge, where two answers are right
    beyond = padding(lengths, t)
    y = ntc(y.to(dtype).masked_fill(beyond, torch.nan))  # nothing reads it: these are not the batch's own statistics

    z = triton_bn.forward(y, norm, None, zeroed)
    out, got_mean, got_m2 = triton_impl.forward_stats(z, weight, geometry, lengths)
    dout = ntc(torch.randn(out.shape, device=device).to(dtype))
    got = {"z": z, "y": out, "dw": triton_impl.wgrad(z, dout, k, geometry, lengths)}
    if geometry.stride == 1:
        g, got["dbeta"], got["dgamma"] = triton_impl.dgrad_bn(dout, weight, geometry, y, z, norm, zeroed)
        got["dy"] = triton_bn.backward_apply(g, y, None, norm, None, Mask(lengths), False)[0]

    keep = philox.keep_mask(n, c, t, P, seed, device) & ~beyond

    def plain(kind):
        wide = torch.float64 if kind == torch.float64 else torch.float32
        leaf = y.masked_fill(beyond, 0.0).to(kind).clone(memory_format=torch.contiguous_format).requires_grad_()
        v = [u.to(wide) for u in (mean, rstd)]
        a, b = gamma.to(wide).clone().requires_grad_(), beta.to(wide).clone().requires_grad_()
        w = weight.to(kind).clone().requires_grad_()
        pre = (leaf.to(wide) - v[0][:, None]) * v[1][:, None] * a[:, None] + b[:, None]
        z = (pre.relu() / (1 - P)).where(keep, 0.0).to(kind)
        out = F.conv1d(z, w, None, *geometry)
        out.backward(dout.to(kind))
        return {"z": z, "y": out, "dw": w.grad, "dy": leaf.grad, "dgamma": a.grad, "dbeta": b.grad}

    low, ref = plain(dtype), plain(torch.float64)
    for name, value in got.items():
        assert_close(name, value, low[name], ref[name])
    var, mean = torch.var_mean(ref["y"], (0, 2), correction=0)
    rows = n * out.shape[2]
    scale = (var + mean.square()).sqrt().max()
    eps = torch.finfo(dtype).eps  # z is rounded before the conv
    assert ((got_mean - mean).abs() / scale).max() <= 4 * eps
    assert ((got_m2 / rows - var).abs() / scale.square()).max() <= 8 * eps


def test_inference(shape, batch, dtype):
    device = make_face("triton").device
    x, weight, geometry, lengths = make(layer(shape, batch), dtype, device)
    (n, _, t), (c_out, _, k) = x.shape, weight.shape
    t_out, ends = geometry.frames(t, k), geometry.frames(lengths, k)
    inside = ~padding(ends, t_out).transpose(1, 2)
    x = mask(x, lengths, torch.nan).transpose(1, 2)
    panes = torch.randn(n, t_out, 24, device=device).to(dtype).where(inside, torch.nan)
    panes = panes if geometry.stride == 1 else None
    w2, bias = (torch.randn(c_out, 24, 1) / 5).to(device, dtype), torch.randn(c_out, device=device)
    given = {"lengths": Lengths(lengths, ends), "relu": True}
    packed = None if panes is None else (panes, triton_impl.pack(w2))
    got = triton_impl.fused(x, triton_impl.pack(weight), geometry, bias=bias, panes=packed, **given)

    def plain(kind):
        wide = None if panes is None else (panes.to(kind), w2.to(kind))
        return reference.fused(x.to(kind), weight.to(kind), geometry, bias=bias.to(kind), panes=wide, **given)

    assert_close("z", got, plain(dtype), plain(torch.float64))
    assert (got.masked_select(~inside) == 0).all()
