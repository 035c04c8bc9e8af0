"""One check of the self-check: right kernels pass, wrong ones are found, and a fault of the machine blames no
kernel."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import make_face, raising
from standins import verdicts_of_its_own, wrap  # noqa: F401

from jasper_fast.dispatch import backends, verdict, verdicts
from jasper_fast.dispatch.verdict import UNCHECKED
from jasper_fast.kernels import launch, tables
from jasper_fast.kernels.panes import gram
from jasper_fast.selfcheck import checks, perform
from jasper_fast.selfcheck.checks import Check, Conv, Norm

ROOT = Path(__file__).resolve().parents[1]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONV = Conv(2, 21, 24, 20, 5)


@pytest.fixture(params=["cpu", "triton"])
def face(request) -> str:
    return make_face(request.param).name


def here(face: str) -> torch.device:
    """Returns the device on which `face` runs here."""
    return make_face(face).device


def conv_check(face: str, function: str = "forward", **more) -> Check:
    return Check("conv1d", face, function, "default", CONV, "float32", **more)


def norm_check(face: str, function: str = "forward", variant: str = "batch") -> Check:
    return Check("bn_relu_dropout", face, function, "default", Norm(2, 24, 21), "float32", variant)


@pytest.mark.parametrize("function", ["forward", "dgrad", "wgrad"])
def test_a_right_conv_passes(face, function):
    row = perform.perform(conv_check(face, function), here(face))
    assert row["status"] == "ok" and 0 <= row["share"] <= 1, row


@pytest.mark.parametrize("function", ["stats", "forward", "backward"])
@pytest.mark.parametrize("variant", checks.NORM_VARIANTS)
def test_a_right_norm_passes(face, function, variant):
    row = perform.perform(norm_check(face, function, variant), here(face))
    assert row["status"] == "ok", row


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("variant", [*checks.FUSED_VARIANTS, "plain unclean", "panes unclean", checks.WAVE])
def test_a_right_fused_conv_passes_in_every_form_and_dtype(dtype, variant):
    face = make_face("triton").name
    row = perform.perform(Check("conv1d.fused", face, "fused", "default", CONV, dtype, variant), here(face))
    assert row["status"] == "ok", row


@pytest.mark.parametrize("function", checks.CONV)
@pytest.mark.parametrize("variant", ["", checks.UNCLEAN, checks.WAVE, checks.EXACT])
def test_a_right_conv_passes_in_every_form(function, variant):
    row = perform.perform(conv_check("triton", function, variant=variant), here("triton"))
    assert row["status"] == "ok", row


@pytest.fixture
def launched(monkeypatch):
    """Records the flags of launched conv kernels, with tensor descriptors as on sm_90."""
    impl, run, seen = backends.face("conv1d", make_face("triton").name), launch.run, []

    def watching(kernel, grid, like, *args, **meta):
        if "HAS_DESCRIPTORS" in meta:
            seen.append({k: v for k, v in meta.items() if k.startswith(("HAS", "IS"))})
        return run(kernel, grid, like, *args, **meta)

    monkeypatch.setattr(launch, "run", watching)
    monkeypatch.setattr(impl, "INTERPRET_DESCRIPTORS", True)
    return seen


@pytest.mark.parametrize("function", ["forward", "forward_stats", "wgrad"])
@pytest.mark.parametrize("variant", ["", checks.UNCLEAN])
def test_convs_are_checked_as_they_are_dispatched(function, variant, launched):
    """Shows that convs are checked with and without the promise of zero padding, which selects other code on sm_90."""
    check = Check("conv1d", "triton", function, "default", Conv(2, 21, 64, 64, 3), "bfloat16", variant)
    assert perform.perform(check, here("triton"))["status"] == "ok"
    assert launched and all(f["HAS_DESCRIPTORS"] and f["IS_CLEAN"] is (variant == "") for f in launched)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "by_descriptor"), [(Conv(1, 11, 256, 64, 1), True), (Conv(1, 11, 64, 64, 1), False)])
@pytest.mark.parametrize("variant", ["panes", "panes splits", "panes unclean"])
def test_panes_are_checked_by_descriptors_on_real_shapes_and_without_on_small_ones(
    shape, by_descriptor, variant, launched
):
    check = Check("conv1d.fused", "triton", "fused", "default", shape, "bfloat16", variant)
    row = perform.perform(check, here("triton"))
    assert row["status"] == "ok", row
    for flags in launched:
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


class Stale:
    """Returns the answer for the first inputs in every call."""

    def __init__(self):
        self.first = None

    def __call__(self, out, *_):
        self.first = out if self.first is None else self.first
        return self.first


class OneBuffer(Stale):
    """Returns right answers in one buffer, which the next call overwrites."""

    def __call__(self, out, *_):
        if self.first is None:
            self.first = out.clone()
        return self.first.copy_(out)


class Drifting:
    """Returns an answer that is a little larger in every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, out, *_):
        self.calls += 1
        return out * (1 + self.calls * 2.0**-22)


class LateRace:
    """Returns a wrong answer in the third call with the same inputs."""

    def __init__(self):
        self.calls = 0

    def __call__(self, out, *_):
        self.calls += 1
        return torch.nextafter(out, out + 1) if self.calls == 4 else out  # the second call had other inputs


def spoiled(monkeypatch, op: str, name: str, spoil) -> None:
    """Makes a function of the CPU face return `spoil(...)` of its result."""
    wrap(monkeypatch, backends.face(op, make_face("cpu").name), name, lambda right, *a, **how: spoil(right(*a, **how)))


@pytest.mark.parametrize(("variant", "status"), [("", "ok"), (checks.WAVE, "wrong")])
def test_where_the_gpu_is_full_the_same_inputs_are_tried_three_times(variant, status, monkeypatch):
    spoiled(monkeypatch, "conv1d", "forward", LateRace())
    row = perform.perform(conv_check("cpu", variant=variant), CPU)
    assert row["status"] == status, row


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [False, True])
def test_products_of_panes_are_checked(dtype, wrong, monkeypatch):
    right = gram.product
    if wrong:
        monkeypatch.setattr(gram, "product", lambda a, b: 1.02 * right(a, b))
    row = perform.perform(Check("panes", "aten", "panes", "default", Norm(2, 24, 37), dtype), CPU)
    assert row["status"] == ("wrong" if wrong else "ok"), row


@pytest.mark.parametrize("function", ["outputs", "forward", "backward_reduce", "gradients"])
def test_a_wrong_kernel_of_the_plain_panes_is_caught(function, monkeypatch):
    impl = backends.face("panes", make_face("cpu").name)
    right, check = getattr(impl, function), Check("panes", "cpu", "plain", "default", Norm(2, 24, 37), "float32")
    assert perform.perform(check, CPU)["status"] == "ok"

    def wrong(*args):
        out = right(*args)
        for x in (args[-1],) if out is None else out[0] if isinstance(out, tuple) else (out,):
            x.mul_(1.01)
        return out

    monkeypatch.setattr(impl, function, wrong)
    assert perform.perform(check, CPU)["status"] == "wrong"


@pytest.mark.parametrize("variant", checks.STEP_VARIANTS)
def test_a_wrong_step_is_caught(face, variant, monkeypatch):
    impl, check = backends.face("novograd", face), Check("novograd", face, "step", "default", CONV, "float32", variant)
    right, faults = impl.step, [lambda t, out: t.exp_avgs[1].view(-1)[-1].add_(1e-3), lambda t, out: out[1].sub_(1.0)]
    faults += [] if variant == "plain" else [lambda t, out: t.averages[2].mul_(1.001)]
    row = perform.perform(check, here(face))
    assert row["status"] == "ok", row
    for spoil in faults:

        def wrong(tensors, *more, spoil=spoil):
            out = right(tensors, *more)
            spoil(tensors, out)
            return out

        monkeypatch.setattr(impl, "step", wrong)
        assert perform.perform(check, here(face))["status"] == "wrong"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("op", ["conv1d", "conv1d.fused", "bn_relu_dropout"])
def test_a_wrong_kernel_in_16_bits_is_caught(op, dtype, monkeypatch):
    face = make_face("cpu").name
    impl, name = backends.face(op.partition(".")[0], face), "fused" if op == "conv1d.fused" else "forward"
    shape, variant = (
        (CONV, "plain" if name == "fused" else "") if op != "bn_relu_dropout" else (Norm(2, 24, 21), "batch")
    )
    check, right = Check(op, face, name, "default", shape, dtype, variant), getattr(impl, name)
    assert perform.perform(check, CPU)["status"] == "ok"
    monkeypatch.setattr(impl, name, lambda *args, **how: 1.03 * right(*args, **how))
    assert perform.perform(check, CPU)["status"] == "wrong"


WRONG = [scale, drop_a_row, one_element, in_half_precision, not_a_number, Stale, Drifting]


@pytest.mark.parametrize("fault", WRONG, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("op", "function", "name"), [
    ("conv1d", "forward", "forward"), ("conv1d", "dgrad", "dgrad"), ("conv1d", "wgrad", "wgrad"),
    ("bn_relu_dropout", "forward", "forward"),
])  # fmt: skip
def test_a_wrong_kernel_is_caught(op, function, name, fault, monkeypatch):
    spoiled(monkeypatch, op, name, fault() if isinstance(fault, type) else fault)
    check = conv_check("cpu", function) if op == "conv1d" else norm_check("cpu", function)
    row = perform.perform(check, CPU)
    assert row["status"] == "wrong", row
    assert row["detail"]


@pytest.mark.parametrize("function", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize(("bits", "tf32", "status"), [(10, True, "ok"), (10, False, "wrong"), (7, True, "wrong")])
def test_fp32_is_held_to_tf32_where_convs_round_to_it(function, bits, tf32, status, monkeypatch):
    """Shows that operands truncated to TF32's 10 bits pass only if TF32 is allowed, and that 7 bits never pass.
    PyTorch's convs are exact here, as cuDNN's may be."""
    impl, floor = backends.face("conv1d", make_face("cpu").name), perform._floor
    right = getattr(impl, function)

    def cut(x):
        return (x.view(torch.int32) & -(1 << (23 - bits))).view(torch.float32)

    monkeypatch.setattr(impl, function, lambda a, b, *rest, **how: right(cut(a), cut(b), *rest, **how))
    monkeypatch.setattr(impl, "takes_tf32", lambda: tf32, raising=False)
    monkeypatch.setattr(perform, "_floor", lambda check, device: floor(check, GPU))
    check = dataclasses.replace(conv_check("cpu", function), shape=Conv(2, 200, 256, 256, 11))
    assert perform.perform(check, CPU)["status"] == status


def test_an_exact_check_asks_for_exact_products_and_leaves_the_setting_as_it_was(monkeypatch):
    impl, seen = backends.face("conv1d", make_face("cpu").name), []
    right, conv = impl.forward, torch.backends.cudnn.conv
    monkeypatch.setattr(impl, "forward", lambda *args: seen.append(conv.fp32_precision) or right(*args))
    before, conv.fp32_precision = conv.fp32_precision, "tf32"
    try:
        for variant in ("", checks.EXACT):
            assert perform.perform(conv_check("cpu", variant=variant), CPU)["status"] == "ok"
        assert set(seen[:3]) == {"tf32"} and set(seen[3:]) == {"ieee"} and conv.fp32_precision == "tf32"
    finally:
        conv.fp32_precision = before


def test_a_buffer_that_is_shared_by_calls_is_no_fault_of_its_results(monkeypatch):
    """Shows that results in a shared buffer pass, because they are compared before the next call. The ops' tests check
    whether results may be kept."""
    spoiled(monkeypatch, "conv1d", "forward", OneBuffer())
    assert perform.perform(conv_check("cpu"), CPU)["status"] == "ok"


def test_padding_that_is_read_is_caught(monkeypatch):
    impl = backends.face("conv1d", make_face("cpu").name)
    wrap(monkeypatch, impl, "forward", lambda right, x, w, geometry, lengths, *_: right(x, w, geometry, None))
    row = perform.perform(conv_check("cpu"), CPU)
    assert row["status"] == "wrong" and "nan" in row["detail"]


def test_a_wrong_dropout_mask_is_caught(monkeypatch):
    impl = backends.face("bn_relu_dropout", make_face("cpu").name)
    wrap(monkeypatch, impl, "forward", lambda right, *a: right(*a[:-1], a[-1]._replace(seed=a[-1].seed + 1)))
    assert perform.perform(norm_check("cpu"), CPU)["status"] == "wrong"


def test_a_kernel_that_raises_is_caught_and_quoted(monkeypatch):
    error = RuntimeError("PassManager::run failed\nsecond line")
    monkeypatch.setattr(backends.face("conv1d", make_face("cpu").name), "forward", raising(error))
    row = perform.perform(conv_check("cpu"), CPU)
    assert (row["status"], row["detail"]) == ("failed", "RuntimeError: PassManager::run failed")


GCC = ["/usr/bin/gcc", "main.c", "-shared", "-o", "main.so"]


@pytest.mark.parametrize(("error", "told"), [
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "set CC to one"),
    (subprocess.CalledProcessError(1, GCC), "Python's headers (python3-dev)"),
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
    assert verdicts.read(CPU) == {}, "it is tried again when the machine has it"


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
    row = perform.perform(conv_check("cpu"), CPU)
    assert row["status"] == "environment"
    assert row["detail"].startswith("plain PyTorch: RuntimeError: cuDNN error: CUDNN_STATUS_NOT_INITIALIZED (")


def test_a_check_of_a_tile_runs_that_tile(monkeypatch):
    face = make_face("triton").name
    tile = {"t": 16, "n": 32, "k": 16, "num_warps": 2, "num_stages": 2, "splits": 1}
    seen, run = [], launch.run

    def watching(kernel, grid, like, *args, **meta):
        seen.append({k: meta.get(k) for k in ("BLOCK_T", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")})
        return run(kernel, grid, like, *args, **meta)

    monkeypatch.setattr(launch, "run", watching)
    row = perform.perform(conv_check(face, tile=tile), here(face))
    assert row["status"] == "ok", row
    wanted = {"BLOCK_T": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 2, "num_stages": 2}
    assert wanted in seen
    assert tables.lookup("conv1d.forward", CPU, torch.float32, c_in=24, c_out=20, taps=5, stride=1, dilation=1,
                         rows=42) is None  # fmt: skip
