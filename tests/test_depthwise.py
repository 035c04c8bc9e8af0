"""The depthwise conv on every face: against F.conv1d and autograd in fp64, by the tolerance rule of all tests."""

import functools

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from conftest import check_op, make_face, settle
from conv_cases import pytorch
from standins import CPU
from torch import Tensor

from jasper_fast import ops
from jasper_fast.dispatch import backends, choose
from jasper_fast.kernels import native
from jasper_fast.kernels.depthwise import reference
from jasper_fast.kernels.layout import mask, ntc
from jasper_fast.kernels.operands import Geometry, Lengths

# (C, K, T, stride, dilation, lengths). The taps of the first six are those of layers of QuartzNet 15x5.
CASES = {
    "prologue": (64, 33, 75, 2, 1, [75, 20]),
    "k33": (48, 33, 70, 1, 1, [70, 9]),
    "k39": (33, 39, 40, 1, 1, [1, 40]),
    "k63": (30, 63, 37, 1, 1, [37, 0]),
    "k75": (64, 75, 100, 1, 1, None),
    "epilogue, dilated": (40, 87, 61, 1, 2, [61, 30, 0]),
    "one frame": (17, 33, 1, 1, 1, [1, 0]),
    "one frame, dilated": (16, 87, 1, 1, 2, None),
    "one channel": (1, 11, 29, 1, 1, [29, 13]),
    "one tap": (70, 1, 12, 1, 1, [12, 5]),
    "stride and dilation": (20, 9, 50, 2, 2, [50, 31]),
    "even taps": (40, 6, 41, 2, 1, [41, 30]),
    "long": (8, 11, 300, 1, 1, [300, 129]),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(shape: tuple, dtype: torch.dtype, device: torch.device | None = None) -> tuple:
    """Returns x, the weight, dy, the geometry and the lengths. x and dy have NTC memory and NaN in their padding."""
    c, k, t, stride, dilation, lengths = shape
    geometry = Geometry(stride, k // 2 * dilation, dilation)
    n, t_out = 2 if lengths is None else len(lengths), geometry.frames(t, k)
    masks = Lengths()
    if lengths is not None:
        before = torch.tensor(lengths)
        masks = Lengths(before.to(device), geometry.frames(before, k).clamp(0, t_out).to(device))
    x, dy = torch.randn(n, c, t, device=device), torch.randn(n, c, t_out, device=device)
    weight = (torch.randn(c, 1, k, device=device) / k**0.5).to(dtype)
    x, dy = (ntc(mask(v.to(dtype), of, torch.nan)) for v, of in ((x, masks.before), (dy, masks.after)))
    return x, weight, dy, geometry, masks


def ours(impl, x, weight, dy, geometry: Geometry, masks: Lengths) -> dict[str, Tensor]:
    return {
        "y": impl.forward(x, weight, geometry, masks),
        "dx": impl.dgrad(dy, weight, x.shape[2], geometry, masks),
        "dw": impl.wgrad(x, dy, weight.shape[2], geometry, masks),
    }


def face_of(name: str):
    if name == "aten":
        return backends.face("depthwise", "aten"), CPU
    face = make_face(name)
    return face.load("depthwise"), face.device


@pytest.mark.parametrize("case", CASES)
def test_reference_is_conv1d(case: str) -> None:
    *of, masks = make(CASES[case], torch.float64)
    torch.testing.assert_close(ours(reference, *of, masks), pytorch(*of, torch.float64, *masks[:2]))


def assert_right(name: str, shape: tuple, dtype: torch.dtype) -> None:
    impl, device = face_of(name)
    x, weight, dy, geometry, masks = make(shape, dtype, device)
    low, ref = (pytorch(x, weight, dy, geometry, of, *masks[:2]) for of in (dtype, torch.float64))
    first = ours(impl, x, weight, dy, geometry, masks)
    for part, got in first.items():
        assert part == "dw" or got.transpose(1, 2).is_contiguous()
        assert_close(f"{part} {dtype}", got, low[part], ref[part], 4.0)  # PyTorch's sums may by chance be better
    assert torch.equal(impl.wgrad(x, dy, shape[1], geometry, masks), first["dw"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["reference", "aten", "cpu"])
def test_faces(name: str, case: str) -> None:
    for dtype in DTYPES[:1] if name == "aten" else DTYPES:
        assert_right(name, CASES[case], dtype)


# These have few frames and channels, because the interpreter takes a millisecond for each tap of each program.
TRITON = {
    "stride 2": ((20, 9, 41, 2, 1, [41, 11]), torch.float32),
    "k87, dilated": ((16, 87, 20, 1, 2, [20, 3]), torch.bfloat16),
    "k33": ((40, 33, 21, 1, 1, [21, 0]), torch.float16),
    "stride and dilation": ((8, 5, 50, 2, 2, None), torch.float32),
    "one frame": ((17, 13, 1, 1, 1, [1, 0]), torch.float32),
    "one channel": ((1, 3, 70, 1, 1, [70, 13]), torch.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "tiles"), [*((case, "small") for case in TRITON), ("stride 2", "large"), ("k33", "large")]
)
def test_triton(case: str, tiles: str, monkeypatch) -> None:
    impl, _ = face_of("triton")
    if tiles == "large":
        monkeypatch.setattr(impl, "FEW_ROWS", 0)
    assert_right("triton", *TRITON[case])


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_slices_of_wider_rows(name: str) -> None:
    """Shows that x and y may be slices of wider rows, as in an engine, and that nothing beside y is written."""
    impl, device = face_of(name)
    x, weight, _, geometry, masks = make(TRITON["k33"][0], torch.float32, device)
    c, wide = x.shape[1], torch.randn(2, x.shape[2], 3 * x.shape[1], device=device)
    wide[:, :, :c] = x.transpose(1, 2)
    before = wide.clone()
    out = wide[:, :, c : 2 * c]
    impl.into(out, wide[:, :, :c], impl.pack_once(weight, x.dtype), geometry, masks)
    torch.testing.assert_close(out.transpose(1, 2), impl.forward(x, weight, geometry, masks), rtol=0, atol=0)
    for beside in (slice(None, c), slice(2 * c, None)):
        torch.testing.assert_close(wide[:, :, beside], before[:, :, beside], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_a_nan_in_a_valid_frame_reaches_its_taps_alone(name: str) -> None:
    impl, device = face_of(name)
    x = torch.randn(1, 16, 60, device=device)
    x[0, 3, 30] = torch.nan
    bad = impl.forward(ntc(x), torch.randn(16, 1, 11, device=device), Geometry(1, 5)).isnan()
    assert bad[0, 3, 25:36].all() and bad.sum() == 11


@pytest.mark.parametrize("name", ["triton", "aten"])
def test_the_output_lengths_are_made_and_may_mask_nothing(name: str) -> None:
    """In the engine, the first launch computes the output lengths. Here one length is larger than T, and is clamped."""
    same = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)  # padding of x is NaN
    impl, device = face_of(name)
    x, weight, _, geometry, masks = make(TRITON["stride 2"][0], torch.float32, device)
    given = torch.tensor([99, 11], device=device)
    for masked in (True, False):
        made, out = torch.empty_like(given), torch.empty(2, 21, 20, device=device)
        impl.into(out, x.transpose(1, 2), impl.pack_once(weight, x.dtype), geometry, Lengths(given, None, made, masked))
        assert made.tolist() == masks.after.tolist()
        same(out.transpose(1, 2), impl.forward(x, weight, geometry, masks if masked else Lengths()))
    impl.into(out, x.transpose(1, 2), impl.pack_once(weight, x.dtype), geometry, masks._replace(masked=False))
    same(out.transpose(1, 2), impl.forward(x, weight, geometry))
    for wrong in (Lengths(None, None, made), Lengths(given, given, made)):
        with pytest.raises(ValueError, match=r"made needs lengths\.before"):
            impl.into(out, x.transpose(1, 2), impl.pack_once(weight, x.dtype), geometry, wrong)


def test_any_number_of_threads_and_any_batch_give_the_same_bits() -> None:
    cpu, _ = face_of("cpu")
    geometry, lengths = Geometry(1, 31), torch.tensor([300, 171, 40])
    x, dy, weight = ntc(torch.randn(3, 70, 300)), ntc(torch.randn(3, 70, 300)), torch.randn(70, 1, 63)
    whole = ours(cpu, x, weight, dy, geometry, Lengths(lengths, lengths))
    for i, length in enumerate(lengths.tolist()):
        assert torch.equal(cpu.forward(ntc(x[i : i + 1, :, :length]), weight, geometry)[0], whole["y"][i, :, :length])
    for count in (1, 3, 7):
        torch.set_num_threads(count)
        torch.testing.assert_close(ours(cpu, x, weight, dy, geometry, Lengths(lengths, lengths)), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 24, 50).double()}, "float32, float16 or bfloat16"),
        ({"lengths": Lengths(torch.tensor([50]))}, "in_lengths"),
        ({"lengths": Lengths(torch.tensor([51, 3]))}, r"in_lengths\[0\] = 51"),
        ({"lengths": Lengths(None, torch.tensor([50, -1]))}, r"out_lengths\[1\] = -1"),
        ({"x": torch.randn(2, 24, 50)}, "unit channel stride"),
        ({"lengths": Lengths(torch.tensor([50, 3]), masked=False)}, "always masks"),
    ],
)
def test_wrong_arguments_of_the_cpu_face_are_named(change: dict, message: str) -> None:
    cpu, _ = face_of("cpu")
    args = {"x": ntc(torch.randn(2, 24, 50)), "weight": torch.randn(24, 1, 5), "geometry": Geometry(1, 2)} | change
    with pytest.raises((RuntimeError, ValueError), match=message):
        cpu.forward(**args)


# ---- the op ----


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_opcheck(backend: str) -> None:
    backend = settle(backend)
    x, w = torch.randn(2, 8, 11, requires_grad=True), torch.randn(8, 1, 3, requires_grad=True)
    check_op(torch.ops.jasper_fast.depthwise, (x, w, torch.tensor([11, 6]), torch.tensor([6, 3]), 2, 1, 1, backend))


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_gradcheck(stride: int, dilation: int) -> None:
    x, w = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 9), (3, 1, 5)))
    lengths = torch.tensor([9, 4])
    how = {"stride": stride, "padding": 2 * dilation, "dilation": dilation, "lengths": lengths, "backend": "reference"}
    out = Geometry(stride, 2 * dilation, dilation).frames(lengths, 5)
    assert torch.autograd.gradcheck(lambda x, w: ops.depthwise(x, w, out_lengths=out, **how), (x, w))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_takes_the_master_weight(low: torch.dtype) -> None:
    x, w = torch.randn(2, 8, 19), torch.randn(8, 1, 5, requires_grad=True)
    with torch.autocast("cpu", low):
        y = ops.depthwise(x, w, padding=2)
    y.float().sum().backward()
    assert y.dtype == low and w.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_op_is_conv1d_where_x_is_not_in_ntc_memory(dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 12, 31, dtype=dtype), torch.randn(12, 1, 7, dtype=dtype)
    torch.testing.assert_close(ops.depthwise(x, w, padding=3), F.conv1d(x, w, None, 1, 3, 1, 12))


@pytest.mark.parametrize(
    ("x", "w", "how", "message"),
    [
        ((2, 8, 9), (7, 1, 3), {}, "do not fit"),
        ((2, 8, 9), (8, 2, 3), {}, "do not fit"),
        ((2, 8, 9), (8, 1, 13), {}, "too few"),
        ((2, 8, 9), (8, 1, 3), {"stride": 0}, "at least 1"),
        ((2, 8, 9), (8, 1, 3), {"lengths": torch.tensor([1])}, "lengths"),
    ],
)
def test_wrong_arguments_of_the_op_are_named(x, w, how: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.depthwise(torch.randn(x), torch.randn(w), **how)


def test_which_face_runs() -> None:
    assert choose.depthwise_face("auto", CPU, torch.float32) == ("cpu" if native.cpu_available() else "aten")
    assert choose.depthwise_face("auto", CPU, torch.float64) == "aten"
    assert choose.depthwise_face("reference", CPU, torch.float32) == "reference"
    with pytest.raises(backends.BackendMissing):
        choose.depthwise_face("cuda", CPU, torch.float32)
