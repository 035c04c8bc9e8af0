"""16 bits on the CPU face: bf16 products that are exact and summed in fp32, at inference and in training."""

import pytest
import torch
from close import assert_close
from conftest import assert_raises
from conv_cases import pytorch
from engines import batch, config, pair, valid
from standins import CPU, verdicts_of_its_own  # noqa: F401 (a fixture)
from test_conv1d import CASES, PADDED, Case, make

from jasper_fast import InferenceEngine
from jasper_fast.dispatch import choose
from jasper_fast.kernels import native
from jasper_fast.kernels.conv1d import cpu_impl, reference
from jasper_fast.kernels.operands import Geometry, Lengths

pytestmark = pytest.mark.skipif(not native.cpu_available(), reason=str(native.explain()["cpu"]))
BF16 = torch.bfloat16


@pytest.fixture
def cpu():
    if not cpu_impl.has_bf16():
        pytest.skip("this process' instruction set does not multiply bf16 (AVX512-BF16)")
    return cpu_impl


# Some have an odd C_in, more channels than a chunk (128, or 512 if K is at most 4), or more rows than a tile.
BF16_CASES = [
    Case(1, 1, 1, 1, lengths=(1, 0)),
    Case(29, 33, 1, 37, lengths=(37, 5, 0)),
    Case(513, 40, 1, 150, lengths=(150, 149)),
    Case(64, 256, 11, 200, stride=2, lengths=(200, 91, 1)),
    Case(129, 64, 11, 300, lengths=(300, 257, 128)),
    Case(33, 70, 25, 5, lengths=(5, 3, 0)),
    Case(65, 33, 29, 61, dilation=2, lengths=(61, 60)),
    Case(1030, 31, 3, 20, lengths=(20, 7)),
]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("case", BF16_CASES, ids=str)
def test_exact_products_of_rounded_operands(case, relu, cpu) -> None:
    """Shows that outputs are as close to fp64 as PyTorch's in fp32, which are computed from the same bf16 operands."""
    x, weight, _, lengths = make(case)
    x, packed = x.transpose(1, 2), cpu.pack(weight, dtype=BF16)
    options = {"lengths": Lengths(lengths), "relu": relu, "bias": torch.randn(case.c_out)}
    low, ref = (
        reference.fused(x.to(BF16).to(d), weight.to(BF16).to(d), case.geometry, **options)
        for d in (torch.float32, torch.float64)
    )
    got = cpu.fused(x, packed, case.geometry, out=torch.full(ref.shape, float("nan")), **options)
    assert_close("y", got, low, ref)
    assert torch.equal(cpu.fused(x.to(BF16), packed, case.geometry, **options), got)


@pytest.mark.parametrize("case", BF16_CASES, ids=str)
def test_a_result_in_bf16_is_the_fp32_one_rounded(case, cpu) -> None:
    """The results are the same with one thread and with three, and nothing outside of the slice `out` is written."""
    x, weight, _, lengths = make(case)
    given = x.to(BF16).transpose(1, 2), cpu.pack(weight, dtype=BF16), case.geometry
    want = cpu.fused(*given, lengths=Lengths(lengths)).to(BF16)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        around = torch.full((*want.shape[:2], case.c_out + 9), float("nan"), dtype=BF16)
        cpu.fused(*given, out=around[:, :, 4:-5], lengths=Lengths(lengths))
        assert torch.equal(around[:, :, 4:-5], want)
        assert around[:, :, :4].isnan().all() and around[:, :, -5:].isnan().all()
    with pytest.raises(RuntimeError, match="y must be a float32 tensor"):
        cpu.fused(*given, out=want, bias=torch.zeros(case.c_out), lengths=Lengths(lengths))


def test_the_transposed_pack_gives_the_gradient_of_x(cpu) -> None:
    dy, weight = torch.randn(2, 50, 45), torch.randn(45, 38, 5) / 15
    got = cpu.fused(dy, cpu.pack(weight, transposed=True, dtype=BF16), Geometry(1, 2))
    low, ref = (
        reference.dgrad(dy.to(BF16).to(d).transpose(1, 2), weight.to(BF16).to(d), 50, Geometry(1, 2)).transpose(1, 2)
        for d in (torch.float32, torch.float64)
    )
    assert_close("dx", got, low, ref)


def test_wrong_packs_are_named(cpu) -> None:
    weight, x = torch.randn(33, 24, 11), torch.zeros(2, 50, 24)
    packed, panes = cpu.pack(weight, dtype=BF16), (torch.zeros(2, 50, 4), cpu.pack(torch.randn(33, 4, 1)))
    assert_raises([
        (lambda: cpu.pack(weight, algorithm="fast_fir_1", dtype=BF16), "fir_level 0"),
        (lambda: cpu.fused(x, packed, PADDED, panes=panes), "packed2 must have packed's dtype"),
        (lambda: cpu.fused(x.to(BF16), cpu.pack(weight), PADDED), "x must be a float32"),
        (lambda: cpu.fused(torch.zeros(2, 50, 27), packed, PADDED), "elements"),
    ], RuntimeError)  # fmt: skip


def test_a_lower_instruction_set_says_so() -> None:
    """Shows the error of a CPU without bf16 products. test_cpu_instruction_sets.py runs this test as on such a CPU."""
    if cpu_impl.has_bf16():
        pytest.skip("this process multiplies bf16")
    with pytest.raises(RuntimeError, match="does not multiply; pack in float32"):
        cpu_impl.pack(torch.randn(4, 4, 3), dtype=BF16)


def test_an_engine_in_bf16_multiplies_bf16(cpu) -> None:
    _, ours = pair(config(), "cpu")
    engine = InferenceEngine(ours, dtype=BF16)
    convs = [step.conv for step in engine._run.plan.steps]
    assert {conv.packed.data.dtype for conv in convs} == {BF16}
    assert {conv.packed_panes.data.dtype for conv in convs if conv.packed_panes is not None} == {BF16}
    features, lengths = batch([31, 17])
    got, out = engine(features, lengths)
    wide, _ = InferenceEngine(ours)(features, lengths)
    assert not torch.equal(valid(got, out), valid(wide, out))
    torch.testing.assert_close(valid(got, out), valid(wide, out), atol=0.05, rtol=0.05)


def test_an_engine_in_fp16_is_the_one_in_fp32() -> None:
    """Shows that an engine in fp16 computes in fp32 on the CPU face, where fp16 would be no faster."""
    _, ours = pair(config(), "cpu")
    features, lengths = batch([31, 17])
    got, want = (InferenceEngine(ours, dtype=dtype)(features, lengths)[0] for dtype in (torch.float16, torch.float32))
    assert torch.equal(got, want)


CPUS = {  # name: ((has AMX, has AMX-FP16), {dtype: (face at inference, face in training)})
    "none": ((False, False), {"bf16": ("cpu", "cpu"), "fp16": ("cpu", "cpu")}),
    "amx": ((True, False), {"bf16": ("aten", "aten"), "fp16": ("cpu", "cpu")}),
    "amx_fp16": ((True, True), {"bf16": ("aten", "aten"), "fp16": ("aten", "aten")}),
}


@pytest.mark.parametrize("name", CPUS)
def test_aten_gets_the_dtypes_that_it_has_instructions_for(name, monkeypatch) -> None:
    has, wanted = CPUS[name]
    wanted |= {"fp32": ("cpu", "cpu"), "fp64": ("aten", "aten")}
    dtypes = {"bf16": BF16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    for unit, there in zip(("amx_tile", "amx_fp16"), has, strict=True):
        monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda there=there: there)
    for dtype, faces in wanted.items():
        how = "auto", CPU, dtypes[dtype]
        assert (choose.fused_faces(*how)[0], choose.conv_face(*how)) == faces, dtype
        assert choose.fused_faces("reference", CPU, dtypes[dtype]) == ("aten",)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_weight_gradient_multiplies_bf16_and_sums_in_fp32(case, cpu) -> None:
    """Shows that the gradient is as close to fp64 as PyTorch's in fp32, which is computed from the same bf16 inputs."""
    x, weight, dy, lengths = make(case)
    x, dy = x.to(BF16), dy.to(BF16)
    low, ref = (pytorch(x, weight, dy, case.geometry, d, lengths) for d in (torch.float32, torch.float64))
    assert_close("dw", cpu.wgrad(x, dy, case.k, case.geometry, lengths, torch.float32), low["dw"], ref["dw"])


@pytest.mark.parametrize("has_bf16", [False, True])
def test_which_products_training_makes(has_bf16, cpu, monkeypatch) -> None:
    """A CPU with bf16 products rounds the weight to bf16. Other CPUs multiply the fp32 weight."""
    case = Case(40, 33, 5, 30)
    x, weight, dy, _ = make(case)
    monkeypatch.setattr(cpu, "has_bf16", lambda: has_bf16)
    x, weight = x.to(BF16), weight * (1 + 2.0**-11)  # bf16 cannot represent this weight
    got = cpu.forward(x, weight, case.geometry).double()
    exact, rounded = (pytorch(x, w, dy, case.geometry, torch.float64)["y"] for w in (weight, weight.to(BF16)))
    near, far = (rounded, exact) if has_bf16 else (exact, rounded)
    assert (got - near.to(BF16)).abs().sum() < (got - far.to(BF16)).abs().sum()
