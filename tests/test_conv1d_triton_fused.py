"""Inference convs in Triton: one kernel a sub-block, the network's first and last layer, shared reductions."""

from __future__ import annotations

import pytest
import torch
from close import assert_close
from conftest import make_face
from conv_cases import LAYERS, make

from jasper_fast.kernels.conv1d import reference

triton_impl = pytest.importorskip("jasper_fast.kernels.conv1d.triton_impl")


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


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "weights by descriptors"])
def test_the_first_conv_reads_features_as_they_are(dtype, masked, descriptors, monkeypatch):
    """(N, C, T) fp32 in; the cast, the transpose, the mask and the output's lengths are the kernel's."""
    monkeypatch.setattr(triton_impl, "INTERPRET_DESCRIPTORS", descriptors)
    device = make_face("triton").device
    _, weight, *_ = make(LAYERS["prologue"], dtype, device)
    features, lengths = torch.randn(3, 64, 45, device=device), torch.tensor([45, 20, 0], device=device)
    if masked:
        features.masked_fill_((torch.arange(45, device=device) >= lengths[:, None])[:, None], torch.nan)
    made = torch.full((3,), -1, device=device)
    bias = torch.randn(32, device=device)
    room = 26 if masked else 23  # longer than the conv's result: a bucket's length
    out = torch.full((3, room, 32), torch.nan, device=device, dtype=dtype)
    given = {"stride": 2, "padding": 5, "bias": bias, "relu": True}
    triton_impl.fused(
        features.transpose(1, 2), triton_impl.pack(weight), **given, in_lengths=lengths, lengths_out=made,
        masked=masked, out=out,
    )  # fmt: skip
    assert made.tolist() == [23, 10, 0]
    want = reference.fused(
        features.transpose(1, 2).to(dtype), weight, **given | {"bias": bias.to(dtype)},
        **({"in_lengths": lengths, "out_lengths": made} if masked else {}),
    )  # fmt: skip
    assert (out[:, 23:] == 0).all()
    ref = reference.fused(
        features.transpose(1, 2).to(dtype).double(), weight.double(), **given | {"bias": bias.double()},
        **({"in_lengths": lengths, "out_lengths": made} if masked else {}),
    )  # fmt: skip
    assert_close("z", out[:, :23], want, ref)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_last_conv_ends_in_log_softmax(dtype):
    device = make_face("triton").device
    x, weight, *_ = make(LAYERS["decoder"], dtype, device)
    bias, lengths = torch.randn(29, device=device), torch.tensor([19, 4], device=device)
    made = torch.empty_like(lengths)
    rows = x.transpose(1, 2)
    got = triton_impl.fused(
        rows, triton_impl.pack(weight), bias=bias, in_lengths=lengths, lengths_out=made, masked=False, log_softmax=True
    )
    assert torch.equal(made, lengths) and got.dtype == torch.float32
    logits = rows.double() @ weight[:, :, 0].double().T + bias
    low = (rows @ weight[:, :, 0].T + bias.to(dtype)).float().log_softmax(2)
    assert_close("log-probabilities", got, low, logits.log_softmax(2))
    with pytest.raises(ValueError, match="up to 128"):
        triton_impl.fused(rows, triton_impl.pack(torch.randn(129, 64, 1).to(device, dtype)), log_softmax=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("splits", [2, 3, 7])
def test_a_shared_reduction_gives_the_same_and_repeats(splits, dtype, monkeypatch):
    """splits programs a tile: right, the same bits again, counters back at 0, nothing of an earlier launch left."""
    device = make_face("triton").device
    x, weight, *shape, lengths = make(LAYERS["k13"], dtype, device)
    n, _, t = x.shape
    names = dict(zip(("stride", "padding", "dilation"), shape, strict=True))
    panes = torch.randn(n, t, 40, device=device).to(dtype)
    w2, bias = (torch.randn(48, 40, 1) / 7).to(device, dtype), torch.randn(48, device=device)
    given = names | {"in_lengths": lengths, "bias": bias, "relu": True, "out_lengths": lengths, "x2": panes}
    alone = triton_impl.fused(x.transpose(1, 2), triton_impl.pack(weight), **given, packed2=triton_impl.pack(w2))
    choose = triton_impl.triton_tiles.choose
    monkeypatch.setattr(
        triton_impl.triton_tiles, "choose", lambda *a: choose(*a)._replace(n=16, k=16, splits=splits)
    )  # fmt: skip
    workspace, results = triton_impl.Workspace(device), []
    for _ in range(2):
        results.append(
            triton_impl.fused(
                x.transpose(1, 2), triton_impl.pack(weight), **given, packed2=triton_impl.pack(w2), workspace=workspace
            )
        )
        assert workspace.arrived.numel() > 0 and (workspace.arrived == 0).all()
        workspace.part.fill_(torch.nan)
    assert torch.equal(*results)
    wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()}
    ref = reference.fused(x.transpose(1, 2).double(), weight.double(), **wide, weight2=w2.double())
    assert_close("z", results[0], alone, ref)
