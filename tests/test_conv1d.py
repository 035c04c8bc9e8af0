"""conv1d: reference.py equals F.conv1d and autograd in fp64, and the CPU kernels meet the tolerance rule."""

from dataclasses import dataclass

import pytest
import torch
from close import assert_close
from conv_cases import pytorch
from standins import wrap
from torch import Tensor

from jasper_fast.kernels import native
from jasper_fast.kernels.conv1d import aten_impl, cpu_impl as cpu, reference
from jasper_fast.kernels.layout import mask, ntc
from jasper_fast.kernels.operands import Geometry, Lengths

needs_native = pytest.mark.skipif(not native.cpu_available(), reason=str(native.explain()["cpu"]))
PADDED = Geometry(1, 5)


@dataclass(frozen=True)
class Case:
    c_in: int
    c_out: int
    k: int
    t: int
    stride: int = 1
    dilation: int = 1
    lengths: tuple[int, ...] | None = None

    @property
    def geometry(self) -> Geometry:
        return Geometry(self.stride, self.k // 2 * self.dilation, self.dilation)


CASES = [
    Case(1, 1, 1, 1),
    Case(29, 33, 1, 37, lengths=(37, 5, 0)),
    Case(256, 29, 1, 200, lengths=(200, 137, 1)),
    Case(64, 256, 11, 200, stride=2, lengths=(200, 91, 1)),
    Case(33, 64, 11, 37, stride=2),
    Case(1, 29, 11, 5, stride=2, lengths=(5, 0, 1)),
    Case(64, 64, 11, 200, lengths=(200, 1, 0)),
    Case(256, 33, 11, 37, lengths=(20, 37, 36)),
    Case(33, 256, 25, 5, lengths=(5, 3, 0)),
    Case(29, 64, 25, 1),
    Case(64, 29, 29, 200, dilation=2, lengths=(200, 77, 0)),
    Case(65, 33, 29, 37, dilation=2),
    Case(256, 256, 2, 37, dilation=2, lengths=(37, 13, 1)),
    Case(64, 33, 3, 301, lengths=(301, 128, 129)),
]


def make(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns x in NTC memory with NaN in its padding, the weight, dy and the lengths."""
    n = 3 if case.lengths is None else len(case.lengths)
    x = torch.randn(n, case.c_in, case.t, dtype=dtype)
    weight = torch.randn(case.c_out, case.c_in, case.k, dtype=dtype) / (case.c_in * case.k) ** 0.5
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    dy = torch.randn(n, case.c_out, case.geometry.frames(case.t, case.k), dtype=dtype)
    return ntc(mask(x, lengths, float("nan"))), weight, ntc(dy), lengths


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_conv1d(case: Case) -> None:
    x, weight, dy, lengths = make(case, torch.float64)
    got = {
        "y": reference.forward(x, weight, case.geometry, lengths),
        "dx": reference.dgrad(dy, weight, case.t, case.geometry, lengths),
        "dw": reference.wgrad(x, dy, case.k, case.geometry, lengths),
    }
    torch.testing.assert_close(got, pytorch(x, weight, dy, case.geometry, torch.float64, lengths))


# The fast algorithms multiply rounded sums of two or four operands, so their errors are larger.
FACTOR = {"direct": 2.0, "fast_fir_1": 4.0, "fast_fir_2": 6.0}
# A NaN or an infinity may spread this many rows beyond those that the taps reach.
REACH = {"direct": 0, "fast_fir_1": 1, "fast_fir_2": 3}


@pytest.fixture(params=FACTOR)
def algorithm(request, monkeypatch) -> str:
    """Makes the CPU face use this algorithm wherever it can."""

    def wanted(weight: Tensor, dtype: torch.dtype, rows: int, stride: int) -> dict[str, object]:
        fits = stride == 1 and weight.shape[2] >= 2 ** cpu.ALGORITHMS[request.param]
        return {"algorithm": request.param if fits else "direct", "dtype": torch.float32}

    monkeypatch.setattr(cpu, "_how", wanted)
    return request.param


@pytest.fixture(params=[*FACTOR, "bf16"])
def packing(request) -> dict:
    """Returns arguments of `pack`: each algorithm in fp32, and bf16."""
    if request.param == "bf16" and not cpu.has_bf16():
        pytest.skip("this process' instruction set does not multiply bf16 (AVX512-BF16)")
    return {"dtype": torch.bfloat16} if request.param == "bf16" else {"algorithm": request.param}


@needs_native
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case: Case, algorithm: str) -> None:
    x, weight, dy, lengths = make(case)
    low, ref = (pytorch(x, weight, dy, case.geometry, d, lengths) for d in (torch.float32, torch.float64))
    y = cpu.forward(x, weight, case.geometry, lengths)
    assert y.stride(1) == 1
    assert_close("y", y, low["y"], ref["y"], FACTOR[algorithm])
    assert_close("dw", cpu.wgrad(x, dy, case.k, case.geometry, lengths), low["dw"], ref["dw"], FACTOR[algorithm])
    if case.stride == 1:
        dx = cpu.dgrad(dy, weight, case.t, case.geometry, lengths)
        assert_close("dx", dx, low["dx"], ref["dx"], FACTOR[algorithm])
    else:
        with pytest.raises(ValueError, match="stride"):
            cpu.dgrad(dy, weight, case.t, case.geometry, lengths)


@needs_native
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_mask", [False, True])
def test_fused_epilogue_on_history_slices(relu: bool, has_mask: bool, packing: dict) -> None:
    n, t, c_in, c2, c_out, k = 3, 150, 63, 531, 96, 11
    lengths = torch.tensor([150, 31, 0])
    history = torch.randn(n, t, c2 + c_out)
    for i, length in enumerate(lengths):
        history[i, length:] = float("nan")
    before = history.clone()
    x2, out, x = history[:, :, :c2], history[:, :, c2:], history[:, :, 7 : 7 + c_in]
    weight, weight2, bias = torch.randn(c_out, c_in, k) / 26, torch.randn(c_out, c2, 1) / 17, torch.randn(c_out)
    options = {"lengths": Lengths(lengths, lengths if has_mask else None), "relu": relu, "bias": bias}
    packed = cpu.pack(weight, **packing)
    dtype = packed.data.dtype
    assert dtype == packing.get("dtype", torch.float32)
    rounded = [v.to(dtype) for v in (x, weight, x2, weight2)]
    low, ref = (
        reference.fused(*wide[:2], PADDED, panes=wide[2:], **options)
        for wide in ([v.to(d) for v in rounded] for d in (torch.float32, torch.float64))
    )
    packed2 = cpu.pack(weight2, dtype=dtype)
    assert cpu.fused(x, packed, PADDED, panes=(x2, packed2), out=out, **options) is out
    got = out.clone()
    assert_close("y", got, low, ref, FACTOR[packed.algorithm])
    torch.testing.assert_close(history[:, :, :c2], before[:, :, :c2], rtol=0, atol=0, equal_nan=True)
    if dtype == torch.bfloat16:
        history = history.to(dtype)  # its slice from channel 7 on has pairs of channels that are not aligned
        cpu.fused(history[:, :, 7 : 7 + c_in], packed, PADDED, panes=(history[:, :, :c2], packed2), out=out, **options)
        assert torch.equal(out, got)


@needs_native
@pytest.mark.parametrize(("value", "relu"), [(torch.nan, False), (torch.nan, True), (torch.inf, False)])
@pytest.mark.parametrize("channel", [3, 40])  # the last of 41 channels forms no pair in bf16
def test_what_is_not_finite_comes_out_of_its_rows_only(packing: dict, value: float, relu: bool, channel: int) -> None:
    x, packed = torch.randn(1, 60, 41), cpu.pack(torch.randn(33, 41, 11), **packing)
    x[0, 30, channel] = value
    bad, reach = ~cpu.fused(x, packed, PADDED, relu=relu).isfinite().all(2)[0], REACH[packed.algorithm]
    assert bad[25:36].all() and not bad[: 25 - reach].any() and not bad[36 + reach :].any()


@needs_native
def test_an_item_is_the_same_bits_in_any_batch_and_with_any_threads(packing: dict) -> None:
    lengths = torch.tensor([300, 171, 40])
    x, weight = torch.randn(3, 300, 96), torch.randn(70, 96, 11)
    packed = cpu.pack(weight, **packing)
    whole = cpu.fused(x, packed, PADDED, lengths=Lengths(lengths, lengths))
    for i, length in enumerate(lengths):
        assert torch.equal(cpu.fused(x[i : i + 1, :length].clone(), packed, PADDED)[0], whole[i, :length])
    for count in (1, 3, 7):
        torch.set_num_threads(count)
        assert torch.equal(packed.data, cpu.pack(weight, **packing).data)
        assert torch.equal(whole, cpu.fused(x, packed, PADDED, lengths=Lengths(lengths, lengths)))


@needs_native
def test_the_gradient_of_the_weight_is_the_same_bits_with_any_threads(algorithm: str) -> None:
    given = ntc(torch.randn(3, 96, 300)), ntc(torch.randn(3, 70, 300)), 11, PADDED, torch.tensor([300, 171, 40])
    dw = cpu.wgrad(*given)
    for count in (1, 3, 7):
        torch.set_num_threads(count)
        assert torch.equal(dw, cpu.wgrad(*given))


@needs_native
def test_pack_into_a_buffer_of_the_callers() -> None:
    weight = torch.randn(40, 24, 11)
    buffer = torch.full((cpu.packed_size(weight),), float("nan"))
    assert cpu.pack(weight, out=buffer).data is buffer
    assert torch.equal(buffer, cpu.pack(weight).data)


@needs_native
@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (RuntimeError, {"lengths": Lengths(torch.tensor([50]))}, "in_lengths"),
        (RuntimeError, {"lengths": Lengths(torch.tensor([51, 3]))}, r"in_lengths\[0\] = 51"),
        (RuntimeError, {"bias": torch.zeros(3)}, "bias"),
        (RuntimeError, {"out": torch.empty(2, 50, 31)}, r"y must be \(2, T_out, 33\)"),
        (RuntimeError, {"out": torch.empty(2, 49, 33)}, "50 frames"),
        (RuntimeError, {"x": torch.zeros(2, 24, 50).transpose(1, 2)}, "unit channel stride"),
        (RuntimeError, {"x": torch.zeros(2, 50, 24).double()}, "float32"),
        (ValueError, {"lengths": Lengths(masked=False)}, "does not compute"),
        (ValueError, {"lengths": Lengths(torch.tensor([50, 3]), made=torch.empty(2).long())}, "does not compute"),
    ],
)
def test_wrong_arguments_are_named(error: type[Exception], change: dict, message: str) -> None:
    given = {"x": torch.zeros(2, 50, 24), "packed": cpu.pack(torch.randn(33, 24, 11)), "geometry": PADDED} | change
    with pytest.raises(error, match=message):
        cpu.fused(**given)


@pytest.mark.parametrize(("n", "t", "stride"), [(3, 37, 1), (1, 12, 1), (2, 40, 2)])
def test_the_librarys_gradients_stay_in_channels_last_memory(n, t, stride, monkeypatch):
    """Shows that ATen's backward copies no tensor to another memory order. Whether ATen copies depends on strides: it
    would copy dy and dx if x were expanded from a scalar (stride 0)."""
    x, weight = ntc(torch.randn(n, 16, t)), torch.randn(24, 16, 5)
    dy = ntc(torch.randn(n, 24, (t - 1) // stride + 1))
    seen = []

    def noted(right, *args):
        out = right(*args)
        found = [v for v in (*args[:2], out[0]) if v is not None]  # `out[0]` is None if only dweight is asked for
        seen.append([v.is_contiguous(memory_format=torch.channels_last) and 0 not in v.stride() for v in found])
        return out

    wrap(monkeypatch, torch.ops.aten, "convolution_backward", noted)
    dx = aten_impl.dgrad(dy, weight, t, Geometry(stride, 2))
    dw = aten_impl.wgrad(x, dy, 5, Geometry(stride, 2))
    assert seen == [[True, True, True], [True, True]]
    torch.testing.assert_close(dx, reference.dgrad(dy, weight, t, Geometry(stride, 2)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dw, reference.wgrad(x, dy, 5, Geometry(stride, 2)), rtol=1e-4, atol=1e-4)
