"""Single checks of the self-check: correct kernels pass, wrong ones are found, and no kernel is blamed for a fault of
the machine."""

import dataclasses
import itertools
import subprocess

import pytest
import torch
from conftest import make_face, raising
from standins import CONV, CPU, GPU, spied, verdicts_of_its_own, wrap  # noqa: F401

from jasper_fast.dispatch import backends, verdict, verdicts
from jasper_fast.dispatch.verdict import UNCHECKED
from jasper_fast.kernels import launch, precision, tables
from jasper_fast.kernels.panes import gram
from jasper_fast.selfcheck import checks, perform
from jasper_fast.selfcheck.checks import Check, Conv, Norm


def conv_check(face: str, function: str = "forward", **more) -> Check:
    return Check("conv1d", face, function, "default", CONV, "float32", **more)


def norm_check(face: str, function: str = "forward", variant: str = "batch") -> Check:
    return Check("bn_relu_dropout", face, function, "default", Norm(2, 24, 21), "float32", variant)


def assert_is(status: str, check: Check) -> dict:
    """Performs `check` on the device of its face, asserts that it has this status, and returns its row."""
    row = perform.perform(check, make_face(check.face).device)
    assert row["status"] == status, row
    assert status != "ok" or 0 <= row["share"] <= 1
    assert status != "wrong" or row["detail"]
    return row


@pytest.mark.parametrize(("function", "variant"), [
    ("stats", "batch"), *itertools.product(("forward", "backward"), checks.NORM_VARIANTS),
])  # fmt: skip
@pytest.mark.parametrize("face", ["cpu", "triton"])
def test_a_right_norm_passes(face, function, variant):
    assert_is("ok", norm_check(face, function, variant))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "variant"), [
    *itertools.product(
        ("float32", "bfloat16"), (*checks.FUSED_VARIANTS, "plain unclean", "panes unclean", checks.WAVE)
    ),
    ("float16", "panes splits"), ("float16", "log-softmax"),
])  # fmt: skip
def test_a_right_fused_conv_passes_in_every_form_and_dtype(dtype, variant):
    assert_is("ok", Check("conv1d.fused", "triton", "fused", "default", CONV, dtype, variant))


@pytest.mark.parametrize(("face", "function", "variant"), [
    *itertools.product(["cpu"], ["forward", "dgrad", "wgrad"], [""]),
    *itertools.product(["triton"], checks.CONV, ["", checks.UNCLEAN, checks.WAVE, checks.EXACT]),
])  # fmt: skip
def test_a_right_conv_passes_in_every_form(face, function, variant):
    assert_is("ok", conv_check(face, function, variant=variant))


@pytest.fixture
def launched(monkeypatch):
    """Lets convs use tensor descriptors as on sm_90. Returns a function that returns the flags of each conv kernel
    launched so far."""
    seen = spied(monkeypatch, launch, "run", lambda *_, **flags: flags)
    monkeypatch.setattr(backends.face("conv1d", make_face("triton").name), "INTERPRET_DESCRIPTORS", True)
    return lambda: [flags for flags in seen if "HAS_DESCRIPTORS" in flags]


@pytest.mark.parametrize("function", ["forward", "forward_stats", "wgrad"])
@pytest.mark.parametrize("variant", ["", checks.UNCLEAN])
def test_convs_are_checked_as_they_are_dispatched(function, variant, launched):
    """Convs are checked with and without the promise of zero padding (`clean`), which selects other code on sm_90."""
    assert_is("ok", Check("conv1d", "triton", function, "default", Conv(2, 21, 64, 64, 3), "bfloat16", variant))
    assert {(f["HAS_DESCRIPTORS"], f["IS_CLEAN"]) for f in launched()} == {(True, variant == "")}


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "by_descriptor", "variant"), [
    *((Conv(1, 11, 256, 64, 1), True, variant) for variant in ("panes", "panes splits", "panes unclean")),
    (Conv(1, 11, 64, 64, 1), False, "panes"),
])  # fmt: skip
def test_panes_are_checked_by_descriptors_on_real_shapes_and_without_on_small_ones(
    shape, by_descriptor, variant, launched
):
    assert_is("ok", Check("conv1d.fused", "triton", "fused", "default", shape, "bfloat16", variant))
    for flags in launched():
        assert flags["HAS_PANES"] and flags["HAS_DESCRIPTORS"] is by_descriptor
        assert flags["IS_CLEAN"] is (by_descriptor and "unclean" not in variant)


def test_panes_of_every_real_conv_take_descriptors():
    from jasper_fast.kernels.conv1d import triton_tiles

    for s in checks.REAL_CONV:
        if s.stride == 1 and s.c_in >= checks.PANES:
            shape = triton_tiles.Shape(s.c_in, s.c_out, s.k, s.stride, s.dilation, s.n * s.t_out)
            tiles = triton_tiles.candidates("fused", torch.bfloat16, shape, s.t_out)
            assert all(checks.PANES % tile.k == 0 for tile in tiles)


def scale(out, *_):
    return out * 1.001


def drop_a_row(out, *_):
    out = out.clone()
    out[0, :, -1] = 0.0
    return out


def one_element(out, *_):
    out = out.clone()
    out[1, 7, 0] += 0.1 * out.abs().max()
    return out


def in_half_precision(out, *_):
    return out.half().float()


def not_a_number(out, *_):
    return torch.where(torch.arange(out.shape[-1]) == 3, float("nan"), out)


def stale():
    """Makes every call return the result of the first one."""
    kept = []
    return lambda out, *_: kept.append(out) or kept[0]


def one_buffer():
    """Makes every call return its result in the same buffer, which the next call overwrites."""
    kept = []
    return lambda out, *_: kept.append(out.clone()) or kept[0].copy_(out)


def drifting():
    """Makes each result a little larger than the one before."""
    calls = itertools.count(1)
    return lambda out, *_: out * (1 + next(calls) * 2.0**-22)


def late_race():
    """Makes the third call on the same inputs wrong. It is the fourth in all, because the second has other inputs."""
    calls = itertools.count(1)
    return lambda out, *_: torch.nextafter(out, out + 1) if next(calls) == 4 else out


def spoiled(monkeypatch, op: str, name: str, spoil) -> None:
    """Makes a function of the CPU face return `spoil(...)` of its result."""
    wrap(monkeypatch, backends.face(op, make_face("cpu").name), name, lambda right, *a, **how: spoil(right(*a, **how)))


@pytest.mark.parametrize(("fault", "variant", "status"), [
    (late_race, "", "ok"), (late_race, checks.WAVE, "wrong"),  # only a check that fills the GPU makes a fourth call
    (one_buffer, "", "ok"),  # each result is copied before the next call
])  # fmt: skip
def test_calls_on_the_same_inputs_must_agree(fault, variant, status, monkeypatch):
    spoiled(monkeypatch, "conv1d", "forward", fault())
    assert_is(status, conv_check("cpu", variant=variant))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [False, True])
def test_products_of_panes_are_checked(dtype, wrong, monkeypatch):
    if wrong:
        wrap(monkeypatch, gram, "product", lambda right, a, b: 1.02 * right(a, b))
    assert_is("wrong" if wrong else "ok", Check("panes", "aten", "panes", "default", Norm(2, 24, 37), dtype))


@pytest.mark.parametrize("function", ["outputs", "forward", "backward_reduce", "gradients"])
def test_a_wrong_kernel_of_the_plain_panes_is_caught(function, monkeypatch):
    check = Check("panes", make_face("cpu").name, "plain", "default", Norm(2, 24, 37), "float32")
    assert_is("ok", check)

    def wrong(right, *args):
        out = right(*args)
        for x in (args[-1],) if out is None else out[0] if isinstance(out, tuple) else (out,):
            x.mul_(1.01)
        return out

    wrap(monkeypatch, backends.face("panes", "cpu"), function, wrong)
    assert_is("wrong", check)


@pytest.mark.parametrize("variant", checks.STEP_VARIANTS)
@pytest.mark.parametrize("face", ["cpu", "triton"])
def test_a_wrong_step_is_caught(face, variant, monkeypatch):
    impl, check = make_face(face).load("novograd"), Check("novograd", face, "step", "default", CONV, "float32", variant)
    right, faults = impl.step, [lambda t, out: t.exp_avgs[1].view(-1)[-1].add_(1e-3), lambda t, out: out[1].sub_(1.0)]
    faults += [] if variant == "plain" else [lambda t, out: t.averages[2].mul_(1.001)]
    assert_is("ok", check)
    for spoil in faults:

        def wrong(tensors, *more, spoil=spoil):
            out = right(tensors, *more)
            spoil(tensors, out)
            return out

        monkeypatch.setattr(impl, "step", wrong)
        assert_is("wrong", check)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("op", "function", "shape", "variant"), [
    ("conv1d", "forward", CONV, ""), ("conv1d.fused", "fused", CONV, "plain"),
    ("bn_relu_dropout", "forward", Norm(2, 24, 21), "batch"), ("depthwise", "forward", Conv(2, 21, 24, 24, 5), ""),
])  # fmt: skip
def test_a_wrong_kernel_in_16_bits_is_caught(op, function, shape, variant, dtype, monkeypatch):
    check = Check(op, make_face("cpu").name, function, "default", shape, dtype, variant)
    assert_is("ok", check)
    spoiled(monkeypatch, op.partition(".")[0], function, lambda out: 1.03 * out)
    assert_is("wrong", check)


@pytest.mark.parametrize("fault", [
    scale, drop_a_row, one_element, in_half_precision, not_a_number, stale, drifting,
], ids=lambda fault: fault.__name__)  # fmt: skip
@pytest.mark.parametrize("check", [
    *(conv_check("cpu", function) for function in ("forward", "dgrad", "wgrad")), norm_check("cpu", "forward"),
], ids=lambda check: f"{check.op}-{check.function}")  # fmt: skip
def test_a_wrong_kernel_is_caught(check, fault, monkeypatch):
    spoiled(monkeypatch, check.op, check.function, fault() if fault in (stale, drifting) else fault)
    assert_is("wrong", check)


@pytest.mark.parametrize("function", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize(("bits", "tf32", "status"), [(10, True, "ok"), (10, False, "wrong"), (7, True, "wrong")])
def test_fp32_is_held_to_tf32_where_convs_round_to_it(function, bits, tf32, status, monkeypatch):
    """Inputs truncated to 10 bits, as in TF32, pass only if TF32 is allowed; 7 bits never pass. PyTorch's result is
    exact here, as it is on a GPU where cuDNN chooses an exact kernel."""
    impl = backends.face("conv1d", make_face("cpu").name)

    def cut(x):
        return (x.view(torch.int32) & -(1 << (23 - bits))).view(torch.float32)

    wrap(monkeypatch, impl, function, lambda right, a, b, *rest, **how: right(cut(a), cut(b), *rest, **how))
    monkeypatch.setattr(impl, "takes_tf32", lambda: tf32, raising=False)
    wrap(monkeypatch, perform, "_floor", lambda right, check, device: right(check, GPU))
    assert_is(status, dataclasses.replace(conv_check("cpu", function), shape=Conv(2, 100, 128, 128, 11)))


def test_an_exact_check_asks_for_exact_products_and_leaves_the_setting_as_it_was(monkeypatch):
    impl, conv = backends.face("conv1d", make_face("cpu").name), torch.backends.cudnn.conv
    seen = spied(monkeypatch, impl, "forward", lambda *_: conv.fp32_precision)
    with precision.fp32("tf32"):
        for variant in ("", checks.EXACT):
            assert_is("ok", conv_check("cpu", variant=variant))
        assert set(seen[:3]) == {"tf32"} and set(seen[3:]) == {"ieee"} and conv.fp32_precision == "tf32"


def test_padding_that_is_read_is_caught(monkeypatch):
    impl = backends.face("conv1d", make_face("cpu").name)
    wrap(monkeypatch, impl, "forward", lambda right, x, w, geometry, lengths, *_: right(x, w, geometry, None))
    assert "nan" in assert_is("wrong", conv_check("cpu"))["detail"]


def test_a_wrong_dropout_mask_is_caught(monkeypatch):
    impl = backends.face("bn_relu_dropout", make_face("cpu").name)
    wrap(monkeypatch, impl, "forward", lambda right, *a: right(*a[:-1], a[-1]._replace(seed=a[-1].seed + 1)))
    assert_is("wrong", norm_check("cpu"))


def test_a_kernel_that_raises_is_caught_and_quoted(monkeypatch):
    error = RuntimeError("PassManager::run failed\nsecond line")
    monkeypatch.setattr(backends.face("conv1d", make_face("cpu").name), "forward", raising(error))
    assert assert_is("failed", conv_check("cpu"))["detail"] == "RuntimeError: PassManager::run failed"


@pytest.mark.parametrize(("error", "told"), [
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "set CC to one"),
    (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c", "-shared"]), "Python's headers (python3-dev)"),
    (RuntimeError("Cannot find ptxas"), "TRITON_PTXAS_PATH"),
    (FileNotFoundError(2, "No such file or directory", "/opt/ptxas"), "allowed to read and run"),
    (PermissionError(13, "Permission denied", "/root/.triton"), "allowed to read and run"),
    (OSError(28, "No space left on device"), "free space in TRITON_CACHE_DIR"),
    (OSError(122, "Disk quota exceeded"), "free space in TRITON_CACHE_DIR"),
    (ImportError("cuda_utils.so: failed to map segment"), "allowed to read and run"),
    (AssertionError("libcuda.so cannot found!\nPossible files"), "run ldconfig"),
    (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), "nvidia-smi"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "nvidia-smi"),
    (RuntimeError("Triton Error [CUDA]: out of memory"), "nvidia-smi"),
    (MemoryError(), "nvidia-smi"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "another process may use the memory"),
])  # fmt: skip
def test_what_the_machine_lacks_is_no_fault_of_the_kernel(error, told, monkeypatch):
    monkeypatch.setattr(backends.face("conv1d", make_face("cpu").name), "forward", raising(error))
    row = perform.perform(conv_check("cpu"), CPU)
    assert row["status"] in ("environment", "no memory") and told in row["detail"], row
    (found,) = verdict.judge([row], quick=True)
    assert found.status == UNCHECKED and told in found.failure
    verdicts.keep(CPU, [found])
    assert verdicts.read(CPU) == {}, "nothing is saved, so the next process checks again"


@pytest.mark.parametrize("error", [
    RuntimeError("PassManager::run failed"), TypeError("the triton face takes fp32"), ValueError("no gradient"),
    RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("PTXAS error: Internal Triton PTX codegen error"),
])  # fmt: skip
def test_what_a_kernel_does_is_its_fault(error):
    assert verdict.blame(error)["status"] == "failed"


def test_plain_pytorch_that_fails_is_no_fault_of_the_kernel(monkeypatch):
    make_face("cpu")
    monkeypatch.setattr(
        backends.face("conv1d", "aten"), "forward", raising(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"))
    )
    detail = assert_is("environment", conv_check("cpu"))["detail"]
    assert detail.startswith("plain PyTorch: RuntimeError: cuDNN error: CUDNN_STATUS_NOT_INITIALIZED (")


def test_a_check_of_a_tile_runs_that_tile(monkeypatch):
    seen = spied(monkeypatch, launch, "run", lambda *_, **meta: meta)
    tile = {"t": 16, "n": 32, "k": 16, "num_warps": 2, "num_stages": 2, "splits": 1}
    assert_is("ok", conv_check(make_face("triton").name, tile=tile))
    wanted = {"BLOCK_T": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 2, "num_stages": 2}
    assert any(wanted.items() <= meta.items() for meta in seen)
    assert tables.lookup("conv1d.forward", CPU, torch.float32, c_in=24, c_out=20, taps=5, stride=1, dilation=1,
                         rows=42) is None  # fmt: skip
