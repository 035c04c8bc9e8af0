"""Inference convs in Triton: one kernel per sub-block, the network's first and last layer, shared reductions."""

import pytest
import torch
from close import assert_close
from conftest import make_face
from conv_cases import LAYERS, make
from standins import wrap

from jasper_fast.kernels.conv1d import reference, triton_tiles
from jasper_fast.kernels.layout import mask, padding
from jasper_fast.kernels.operands import Geometry, Lengths

triton_impl = pytest.importorskip("jasper_fast.kernels.conv1d.triton_impl")


@pytest.fixture
def device() -> torch.device:
    return make_face("triton").device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("layer", "width"), [("k13", 72), ("one frame", 20), ("odd channels", 37)])
def test_fused_with_panes_over_a_history_buffer(layer, width, dtype, device):
    """Panes and output are slices of one buffer. Its other channels, and the panes' padding, hold NaN."""
    x, weight, shape, lengths = make(LAYERS[layer], dtype, device)
    n, c_out, t = x.shape[0], weight.shape[0], x.shape[2]
    history = torch.full((n, t, width + c_out + 8), torch.nan, device=device, dtype=dtype)
    inside = ~padding(lengths, t).transpose(1, 2)
    history[:, :, :width] = torch.randn(n, t, width).to(device, dtype).where(inside, torch.nan)
    panes, out = history[:, :, :width], history[:, :, width : width + c_out]
    w2, bias = (torch.randn(c_out, width, 1) / width**0.5).to(device, dtype), torch.randn(c_out, device=device)
    given = {"lengths": Lengths(lengths, lengths), "relu": True}
    low, ref = (
        reference.fused(
            x.transpose(1, 2).to(kind), weight.to(kind), shape, bias=bias.to(kind),
            panes=(panes.to(kind), w2.to(kind)), **given,
        )
        for kind in (dtype, torch.float64)
    )  # fmt: skip
    got = triton_impl.fused(
        x.transpose(1, 2), triton_impl.pack(weight), shape, bias=bias, panes=(panes, triton_impl.pack(w2)), out=out,
        **given,
    )  # fmt: skip
    assert got.data_ptr() == out.data_ptr()
    assert_close("z", got, low, ref)
    assert (got.masked_select(~inside) == 0).all()
    assert history[:, :, width + c_out :].isnan().all()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "weights by descriptors"])
def test_the_first_conv_reads_features_as_they_are(dtype, masked, descriptors, device, monkeypatch):
    """Shows that the kernel takes fp32 (N, C, T) features, masks them itself and computes the output lengths."""
    monkeypatch.setattr(triton_impl, "INTERPRET_DESCRIPTORS", descriptors)
    _, weight, *_ = make(LAYERS["prologue"], dtype, device)
    lengths = torch.tensor([45, 20, 0], device=device)
    features = mask(torch.randn(3, 64, 45, device=device), lengths if masked else None, torch.nan)
    made = torch.full((3,), -1, device=device)
    bias = torch.randn(32, device=device)
    # with masks, the output has room for more frames than the conv computes, as in an engine's bucket
    out = torch.full((3, 26 if masked else 23, 32), torch.nan, device=device, dtype=dtype)
    rows, how, masks = features.transpose(1, 2), Geometry(2, 5), Lengths(lengths, None, made, masked)
    triton_impl.fused(rows, triton_impl.pack(weight), how, lengths=masks, bias=bias, relu=True, out=out)
    assert made.tolist() == [23, 10, 0]
    assert (out[:, 23:] == 0).all()
    want, ref = (
        reference.fused(
            rows.to(dtype).to(kind), weight.to(kind), how, bias=bias.to(kind), relu=True,
            lengths=Lengths(lengths, made) if masked else Lengths(),
        )
        for kind in (dtype, torch.float64)
    )  # fmt: skip
    assert_close("z", out[:, :23], want, ref)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_last_conv_ends_in_log_softmax(dtype, device):
    x, weight, *_ = make(LAYERS["decoder"], dtype, device)
    bias, lengths = torch.randn(29, device=device), torch.tensor([19, 4], device=device)
    rows, made = x.transpose(1, 2), torch.empty_like(lengths)
    masks = Lengths(lengths, None, made, masked=False)
    got = triton_impl.fused(rows, triton_impl.pack(weight), Geometry(), bias=bias, lengths=masks, log_softmax=True)
    assert torch.equal(made, lengths)
    logits = rows.double() @ weight[:, :, 0].double().T + bias
    low = (rows @ weight[:, :, 0].T + bias.to(dtype)).float().log_softmax(2)
    assert_close("log-probabilities", got, low, logits.log_softmax(2))
    many = triton_impl.pack(torch.randn(129, 64, 1, device=device), dtype)
    with pytest.raises(ValueError, match="up to 128"):
        triton_impl.fused(rows, many, Geometry(), log_softmax=True)


@pytest.mark.slow
@pytest.mark.parametrize(("splits", "dtype"), [(2, torch.float32), (3, torch.float16), (7, torch.float32)], ids=str)
def test_a_shared_reduction_gives_the_same_and_repeats(splits, dtype, device, monkeypatch):
    """Shows that programs that share a tile give it the same bits in each run, and reset their counters."""
    x, weight, shape, lengths = make(LAYERS["k13"], dtype, device)
    n, _, t = x.shape
    panes = torch.randn(n, t, 40, device=device).to(dtype)
    w2, bias = (torch.randn(48, 40, 1) / 7).to(device, dtype), torch.randn(48, device=device)
    given = {"lengths": Lengths(lengths, lengths), "relu": True}
    ours = given | {"bias": bias, "panes": (panes, triton_impl.pack(w2))}
    alone = triton_impl.fused(x.transpose(1, 2), triton_impl.pack(weight), shape, **ours)
    wrap(monkeypatch, triton_tiles, "choose", lambda right, *a: right(*a)._replace(n=16, k=16, splits=splits))
    workspace, results = triton_impl.Workspace(device), []
    for _ in range(2):
        results.append(
            triton_impl.fused(x.transpose(1, 2), triton_impl.pack(weight), shape, **ours, workspace=workspace)
        )
        assert workspace.arrived.numel() > 0 and (workspace.arrived == 0).all()
        workspace.part.fill_(torch.nan)
    assert torch.equal(*results)
    wide = {"bias": bias.double(), "panes": (panes.double(), w2.double())}
    ref = reference.fused(x.transpose(1, 2).double(), weight.double(), shape, **wide, **given)
    assert_close("z", results[0], alone, ref)
