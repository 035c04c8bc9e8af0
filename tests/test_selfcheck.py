"""The self-check: wrong, crashing and hanging kernels are caught and named; its plan holds all that can be chosen."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import interpreted, make_face

from jasper_fast.dispatch import backends, probe, verdict, verdicts
from jasper_fast.dispatch.verdict import BAD, GOOD, UNCHECKED
from jasper_fast.kernels import launch, tables
from jasper_fast.kernels.panes import gram
from jasper_fast.selfcheck import cases, checks, perform, show
from jasper_fast.selfcheck.checks import Check, Conv, Norm

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
CONV = Conv(2, 21, 24, 20, 5)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JASPER_FAST_CACHE", str(tmp_path / "cache"))
    verdicts.forget()
    yield
    verdicts.forget()


@pytest.fixture(params=["cpu", "triton"])
def face(request) -> str:
    return make_face(request.param).name


def here(face: str) -> torch.device:
    """Where `face` runs on this machine."""
    return make_face(face).device


def conv_check(face: str, function: str = "forward", **more) -> Check:
    return Check("conv1d", face, function, "default", CONV, "float32", **more)


def norm_check(face: str, function: str = "forward", variant: str = "batch") -> Check:
    return Check("bn_relu_dropout", face, function, "default", Norm(2, 24, 21), "float32", variant)


# ---- one check ----


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
    """Flags of the conv kernels that are launched, with tensor descriptors as on sm_90."""
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
    """Told that the padding is zero, which on sm_90 selects other code, and not told."""
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
    """The first answer again, whatever the inputs."""

    def __init__(self):
        self.first = None

    def __call__(self, out, *_):
        self.first = out if self.first is None else self.first
        return self.first


class OneBuffer(Stale):
    """Right answers in one buffer, which the next call overwrites."""

    def __call__(self, out, *_):
        if self.first is None:
            self.first = out.clone()
        return self.first.copy_(out)


class Drifting:
    """Another last bit in every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, out, *_):
        self.calls += 1
        return out * (1 + self.calls * 2.0**-22)


class LateRace:
    """Right but for the third call with the same inputs."""

    def __init__(self):
        self.calls = 0

    def __call__(self, out, *_):
        self.calls += 1
        return torch.nextafter(out, out + 1) if self.calls == 4 else out  # the second was with other inputs


@pytest.mark.parametrize(("variant", "status"), [("", "ok"), (checks.WAVE, "wrong")])
def test_where_the_gpu_is_full_the_same_inputs_are_tried_three_times(variant, status, monkeypatch):
    impl, spoil = backends.face("conv1d", make_face("cpu").name), LateRace()
    right = impl.forward
    monkeypatch.setattr(impl, "forward", lambda *args: spoil(right(*args)))
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
    face = make_face("cpu").name
    impl, spoil = backends.face(op, face), fault() if isinstance(fault, type) else fault
    right = getattr(impl, name)
    monkeypatch.setattr(impl, name, lambda *args, **kwargs: spoil(right(*args, **kwargs)))
    check = conv_check(face, function) if op == "conv1d" else norm_check(face, function)
    row = perform.perform(check, CPU)
    assert row["status"] == "wrong", row
    assert row["detail"]


@pytest.mark.parametrize("function", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize(("bits", "tf32", "status"), [(10, True, "ok"), (10, False, "wrong"), (7, True, "wrong")])
def test_fp32_is_held_to_tf32_where_convs_round_to_it(function, bits, tf32, status, monkeypatch):
    """Operands cut off to `bits`, as tensor cores take them (TF32 has 10), beside PyTorch's convs, exact as cuDNN's may
    be: no fault where TF32 is allowed."""
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


@pytest.mark.parametrize("quick", [True, False])
def test_every_conv_is_checked_with_exact_products_too(gpu, quick):
    plan = [check for check in checks.plan(GPU, quick=quick) if checks.EXACT in check.variant.split()]
    assert {check.dtype for check in plan} == (set() if quick else {"float32"})
    plan = checks.plan(GPU, quick=quick, dtypes=("float32",))
    assert {c.function for c in plan if checks.EXACT in c.variant.split()} == {*checks.CONV, "fused"}


def test_a_buffer_that_is_shared_by_calls_is_no_fault_of_its_results(monkeypatch):
    """Results are compared before the next call: who keeps them longer is the op's affair, tested with the ops."""
    face = make_face("cpu").name
    impl, spoil = backends.face("conv1d", face), OneBuffer()
    right = impl.forward
    monkeypatch.setattr(impl, "forward", lambda *args, **kwargs: spoil(right(*args, **kwargs)))
    assert perform.perform(conv_check(face), CPU)["status"] == "ok"


def test_padding_that_is_read_is_caught(monkeypatch):
    face = make_face("cpu").name
    impl = backends.face("conv1d", face)
    right = impl.forward
    monkeypatch.setattr(impl, "forward", lambda x, w, geometry, lengths, *_: right(x, w, geometry, None))
    row = perform.perform(conv_check(face), CPU)
    assert row["status"] == "wrong" and "nan" in row["detail"]


def test_a_wrong_dropout_mask_is_caught(monkeypatch):
    face = make_face("cpu").name
    impl = backends.face("bn_relu_dropout", face)
    right = impl.forward
    monkeypatch.setattr(impl, "forward", lambda *args: right(*args[:-1], args[-1]._replace(seed=args[-1].seed + 1)))
    assert perform.perform(norm_check(face), CPU)["status"] == "wrong"


def test_a_kernel_that_raises_is_caught_and_quoted(monkeypatch):
    face = make_face("cpu").name

    def broken(*_args, **_kwargs):
        raise RuntimeError("PassManager::run failed\nsecond line")

    monkeypatch.setattr(backends.face("conv1d", face), "forward", broken)
    row = perform.perform(conv_check(face), CPU)
    assert (row["status"], row["detail"]) == ("failed", "RuntimeError: PassManager::run failed")


def test_memory_that_runs_out_is_no_fault_of_the_kernel(monkeypatch):
    face = make_face("cpu").name

    def greedy(*_args, **_kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(backends.face("conv1d", face), "forward", greedy)
    row = perform.perform(conv_check(face), CPU)
    assert row["status"] == "no memory" and "another process may hold the memory: see nvidia-smi" in row["detail"]
    assert verdict.judge([row], quick=True)[0].status == UNCHECKED


GCC = ["/usr/bin/gcc", "main.c", "-shared", "-o", "main.so"]


@pytest.mark.parametrize(("error", "told"), [
    (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), "name one by CC"),
    (subprocess.CalledProcessError(1, GCC), "Python's headers (python3-dev)"),
    (RuntimeError("Cannot find ptxas"), "TRITON_PTXAS_PATH"),
    (FileNotFoundError(2, "No such file or directory", "/opt/ptxas"), "for this user to read, run and write"),
    (PermissionError(13, "Permission denied", "/root/.triton"), "for this user to read, run and write"),
    (OSError(28, "No space left on device"), "free space in TRITON_CACHE_DIR"),
    (OSError(122, "Disk quota exceeded"), "free space in TRITON_CACHE_DIR"),
    (ImportError("cuda_utils.so: failed to map segment"), "for this user to read, run and write"),
    (AssertionError("libcuda.so cannot found!\nPossible files"), "run ldconfig"),
    (RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"), "nvidia-smi"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "nvidia-smi"),
    (RuntimeError("Triton Error [CUDA]: out of memory"), "nvidia-smi"),
    (MemoryError(), "nvidia-smi"),
])  # fmt: skip
def test_what_the_machine_lacks_is_no_fault_of_the_kernel(error, told, monkeypatch):
    def unable(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(backends.face("conv1d", make_face("cpu").name), "forward", unable)
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
    def broken(*_args, **_kwargs):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED")

    make_face("cpu")
    monkeypatch.setattr(backends.face("conv1d", "aten"), "forward", broken)
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


# ---- the plan ----


def test_the_plan_holds_every_function_of_every_face_once(face):
    device = here(face)
    plan = checks.plan(device, faces=(face,))
    assert len({check.id for check in plan}) == len(plan)
    functions = {(check.op, check.function) for check in plan}
    convs = checks.CONV if face == "triton" else ("forward", "dgrad", "wgrad")
    assert functions == {
        *(("bn_relu_dropout", f) for f in ("stats", "forward", "backward")),
        *(("conv1d", f) for f in convs), ("conv1d.fused", "fused"), *([("panes", "plain")] if face == "cpu" else []),
    }  # fmt: skip
    for op in ("bn_relu_dropout", "conv1d"):  # every public function of the face is among them
        names = {"backward" if n.startswith("backward") else n for n in public(op, face)}
        others = {"pack", "pack_once", "packed_shape", "packed_size", "takes_tf32", "has_bf16"}
        assert names - others <= {f for _, f in functions}
    quick = checks.plan(device, faces=(face,), quick=True)
    assert {(c.op, c.function) for c in quick} == functions and len(quick) < len(plan) / 2


def public(op: str, face: str) -> set[str]:
    module = backends.face(op, face)
    named = {name: thing for name, thing in vars(module).items() if not name.startswith("_")}
    return {n for n, t in named.items() if callable(t) and getattr(t, "__module__", "") == module.__name__
            and not isinstance(t, type)}  # fmt: skip


def test_the_plan_leaves_out_what_was_not_asked_for():
    face = make_face("cpu").name
    plan = checks.plan(CPU, ops=("conv1d",), faces=(face,))
    assert {(check.op, check.face) for check in plan} == {("conv1d", "cpu")}
    for name in ("op", "face", "dtype"):
        with pytest.raises(ValueError, match=f"{name} 'conv2d' is not one of"):
            checks.plan(CPU, **{f"{name}s": ("conv2d",)})


GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """An sm_90 with both libraries, without a table."""
    monkeypatch.setenv("JASPER_FAST_TABLES", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Imaginary 9000")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(backends, "why_missing", lambda face, device: "a CPU's" if face == "cpu" else None)


@pytest.mark.parametrize("quick", [True, False])
def test_every_check_is_made_in_the_dtype_that_is_asked_for(gpu, quick):
    plans = {dtype: checks.plan(GPU, quick=quick, dtypes=(dtype,)) for dtype in checks.DTYPES}
    assert all({check.dtype for check in plan} == {dtype} for dtype, plan in plans.items())
    exact = {check.id for check in plans["float32"] if checks.EXACT in check.variant}  # the others are never rounded
    same = [
        {check.id.replace(f"| {dtype} |", "|") for check in plan if check.id not in exact}
        for dtype, plan in plans.items()
    ]
    assert exact and same[0] == same[1] == same[2]
    assert {(c.op, c.face) for c in plans["float16"]} == {
        ("bn_relu_dropout", "triton"), ("bn_relu_dropout", "cuda"), ("conv1d", "triton"), ("conv1d.fused", "triton"),
        ("panes", "aten"),
    }  # fmt: skip
    by_default = [{check.id for check in checks.plan(GPU, quick=quick)}, {c.id for p in plans.values() for c in p}]
    assert by_default[0] == by_default[1] if not quick else by_default[0] == {c.id for c in plans["bfloat16"]}


def test_a_face_is_checked_in_the_dtypes_that_it_has():
    """The C++ kernels in all three, as dispatch takes them, but for the panes' in fp32 alone; a quick check in one."""
    make_face("cpu")
    plan = checks.plan(CPU, faces=("cpu",))
    in_each = {dtype: {check.op for check in plan if check.dtype == dtype} for dtype in checks.DTYPES}
    assert in_each["float32"] == set(verdict.OPS)
    assert in_each["float16"] == in_each["bfloat16"] == set(verdict.OPS) - {"panes"}
    assert {check.dtype for check in checks.plan(CPU, faces=("cpu",), dtypes=("float16",))} == {"float16"}
    assert {check.dtype for check in checks.plan(CPU, quick=True)} <= {"float32", "bfloat16"}


@pytest.mark.parametrize("quick", [True, False])
def test_every_conv_is_checked_once_where_it_fills_the_gpu(gpu, quick):
    from jasper_fast.kernels.conv1d import triton_tiles

    waves = [check for check in checks.plan(GPU, quick=quick, dtypes=("bfloat16",)) if check.variant == checks.WAVE]
    assert [check.function for check in waves] == [*checks.CONV, "fused"]
    for check in waves:
        s = check.shape
        assert (s.n, s.t_out) == (32, 840) and s.c_in == s.c_out == 256
        shape = triton_tiles.Shape(s.c_in, s.c_out, s.k, s.stride, s.dilation, s.n * s.t_out)
        tile = triton_tiles.default(check.function, torch.bfloat16, shape, s.t_out)
        if check.function == "wgrad":
            programs = s.k * -(-s.c_in // tile.n) * -(-s.c_out // tile.k) * tile.splits
        else:
            programs = s.n * -(-s.t_out // tile.t) * -(-s.c_out // tile.n)
        assert programs > 1.5 * 132, "an H100's SMs"
    draw = cases._Draw(CPU, torch.float32, 1, False, True)
    lengths = draw.lengths(32, 840)
    assert lengths[0] == 840 and lengths.min() >= 420, "no program is idle for want of frames"
    assert cases.case(dataclasses.replace(waves[0], face="triton", shape=CONV), CPU, 1).inputs["lengths"].min() > 0


@pytest.mark.parametrize("quick", [True, False])
def test_convs_that_are_not_told_of_zeros_are_checked_on_small_shapes(gpu, quick):
    plan = checks.plan(GPU, quick=quick, dtypes=("bfloat16",), ops=("conv1d", "conv1d.fused"))
    unclean = [check for check in plan if checks.UNCLEAN in check.variant]
    assert {(c.function, c.shape) for c in unclean if c.op == "conv1d"} == {
        (f, s) for f in ("forward", "forward_stats", "wgrad") for s in checks.SMALL_CONV if not quick
    }
    assert {c.variant for c in unclean if c.op != "conv1d"} == (
        set() if quick else {"plain unclean", "panes unclean"}
    )  # fmt: skip
    for check in unclean:
        inputs = cases.case(check, here("triton"), 1).inputs
        assert inputs["given"].isnan().any()


def test_the_plan_of_a_gpu_holds_every_tile_of_its_table(monkeypatch, tmp_path):
    gpu, device = "NVIDIA Imaginary 9000", torch.device("cuda", 0)
    tiles = [{"t": t, "n": 64, "k": 32, "num_warps": 4, "num_stages": 3, "splits": s} for t, s in
             ((16, 1), (32, 1), (64, 1), (128, 4))]  # fmt: skip
    same = {"dtype": "bfloat16", "c_in": 256, "c_out": 384, "taps": 13, "stride": 1, "dilation": 1, "time_s": 1.0}
    ours = {"face": "triton", "algorithm": "direct"}
    rows = [
        tables.Row(op="conv1d.forward", rows_log2=b, tile=t, **same, **ours) for b, t in zip((8, 12, 15), tiles[:3])
    ]
    rows.append(tables.Row(op="conv1d.fused", rows_log2=7, tile=tiles[3], **same, **ours))
    rows.append(tables.Row(op="conv1d.forward", rows_log2=8, tile=None, face="aten", algorithm="library", **same))
    header = dict.fromkeys(tables.HEADER, "x") | {"gpu": gpu, "capability": "sm_90"}
    tables.write(tmp_path / f"{tables.slug(gpu)}.json", header, rows)
    monkeypatch.setenv("JASPER_FAST_TABLES", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "why_missing", lambda face, kind: None if face in ("triton", "cuda") else "not here")

    plan = checks.plan(device)
    measured = [check for check in plan if check.tile]
    assert [check.tile for check in measured] == [*tiles, tiles[3]]
    assert [check.variant for check in measured] == ["", "", "", "splits", "panes splits"]
    assert all((c.shape.c_in, c.shape.c_out, c.shape.k) == (256, 384, 13) for c in measured)
    assert len({check.id for check in plan}) == len(plan)
    assert {check.face for check in plan} == {"triton", "cuda", "aten"}
    real = {(c.shape.c_in, c.shape.c_out) for c in plan if c.op == "conv1d" and not c.tile}
    assert {(768, 768), (896, 1024), (1024, 29), (64, 256)} <= real

    quick = [check.tile for check in checks.plan(device, quick=True) if check.tile]
    assert quick == [*tiles[:3], tiles[3]], "up to three of an op"
    monkeypatch.setattr(checks, "QUICK_TILES", 1)
    assert len([check.tile for check in checks.plan(device, quick=True) if check.tile]) == 2


def test_real_shapes_are_those_of_the_model():
    from jasper_fast import JasperConfig

    encoder = JasperConfig.from_yaml(ROOT / "configs" / "jasper10x5dr.yaml").encoder
    wanted, channels = set(), encoder.in_feats
    for block in encoder.blocks:
        for _ in range(block.repeat):
            wanted.add((channels, block.filters, block.k, block.s, block.d))
            channels = block.filters
    have = {(c.c_in, c.c_out, c.k, c.stride, c.dilation) for c in checks.REAL_CONV}
    assert (64, 256, 11, 2, 1) in wanted and (768, 896, 29, 1, 2) in wanted
    assert len(have & wanted) >= 9 and have - wanted == {(1024, 29, 1, 1, 1)}, "the decoder's is of another list"


# ---- processes that die ----


MODULES = """
import os, signal, sys, time, torch
from jasper_fast.dispatch import backends
from jasper_fast.selfcheck import checks, child, perform
"""


def run_child(code: str, *, seconds: float = 60.0, ops=("conv1d", "bn_relu_dropout"), **more) -> list[dict]:
    """The rows of a supervised process that runs `code` before the self-check, on the CPU face."""
    make_face("cpu")
    full = f"{MODULES}\n{code}\nchild.child()"
    argv = [sys.executable, "-c", full]
    return probe.supervise(CPU, quick=True, ops=ops, faces=("cpu",), seconds=seconds, argv=argv, **more)


BREAK = """
impl = backends.face("conv1d", "cpu")
right = impl.{function}
def broken(x, w, *rest, **more):
    if {where}:
        {what}
    return right(x, w, *rest, **more)
impl.{function} = broken
"""


def test_a_kernel_that_kills_its_process_is_named_and_the_rest_goes_on():
    code = BREAK.format(function="dgrad", where="x.shape[1] == 256", what="os.kill(os.getpid(), 11)")
    told = []
    rows = run_child(code, on_row=lambda row, total: told.append((row["id"], total)))
    by_status = {s: [r for r in rows if r["status"] == s] for s in ("ok", "died", "skipped")}
    (dead,) = by_status["died"]
    assert (dead["function"], dead["shape"]) == ("dgrad", "(2, 256->256, 200) K 11")
    assert "SIGSEGV" in dead["detail"]
    assert {r["op"] for r in by_status["skipped"]} == {"conv1d"}
    assert {r["op"] for r in by_status["ok"]} == {"conv1d", "bn_relu_dropout"}
    plan = checks.plan(CPU, quick=True, ops=("conv1d", "bn_relu_dropout"), faces=("cpu",))
    assert [row["id"] for row in rows] == [check.id for check in plan]
    assert sorted(name for name, _ in told) == sorted(row["id"] for row in rows)
    assert {total for _, total in told} == {len(plan)}

    found = {v.op: v for v in verdict.judge(rows, quick=True)}
    assert found["bn_relu_dropout"].status == GOOD
    assert found["conv1d"].status == BAD
    assert "dgrad default (2, 256->256, 200) K 11 float32 died" in found["conv1d"].failure


@pytest.mark.slow
def test_a_kernel_that_never_ends_is_named():
    code = BREAK.format(function="wgrad", where="True", what="time.sleep(600)")
    rows = run_child(code, seconds=15.0, ops=("conv1d",))
    (hung,) = [row for row in rows if row["status"] == "hung"]
    assert hung["function"] == "wgrad" and "gave no sign for 15 s" in hung["detail"]
    assert verdict.judge(rows, quick=True)[0].status == BAD


@pytest.mark.slow
def test_a_kernel_that_ruins_the_context_is_named():
    """On a GPU the error comes back from the synchronisation after the kernel, and from everything that follows."""
    code = """
device_of = torch.device
torch.device = lambda name: device_of(name) if name != "cpu" else Pretended()
class Pretended:
    type, index = "cuda", 0
    def __str__(self): return "cuda:0"
checks.plan = (lambda plan: lambda device, **more: plan(device_of("cpu"), **more))(checks.plan)
right, done = perform.perform, []
def performing(check, device):
    done.append(check)
    return right(check, device_of("cpu"))
perform.perform = performing
ones, full_like = torch.ones, torch.full_like
torch.ones = lambda *shape, device=None, **more: ones(*shape, **more)
def synchronize(device):
    if done[-1].function == "dgrad":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.synchronize = synchronize
"""
    rows = run_child(code)
    (dead,) = [row for row in rows if row["status"] == "died"]
    assert dead["function"] == "dgrad" and "illegal memory access" in dead["detail"]
    assert {row["op"] for row in rows if row["status"] == "skipped"} == {"conv1d"}
    assert all(row["status"] == "ok" for row in rows if row["op"] == "bn_relu_dropout")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["KILL", "TERM"])
def test_who_ends_the_process_from_outside_is_no_kernel(how):
    """The host's memory has run out, say."""
    rows = run_child(BREAK.format(function="forward", where="True", what=f"os.kill(os.getpid(), signal.SIG{how})"))
    found = {v.op: v for v in verdict.judge(rows, quick=True)}
    assert found["conv1d"].status == UNCHECKED and f"SIG{how} (from outside" in found["conv1d"].failure
    assert found["bn_relu_dropout"].status == GOOD


class OutOfTime(BaseException):
    """As a benchmark's."""


@pytest.mark.slow
def test_a_check_that_is_cut_off_ends_at_once_and_leaves_what_was_found(monkeypatch):
    def cut(*_):
        raise OutOfTime

    def on_row(row, total):
        if row["function"] == "dgrad" and "256" in row["shape"]:  # the next one sleeps
            signal.setitimer(signal.ITIMER_REAL, 1.0)

    ended = spy_on_ends(monkeypatch)
    report, before = probe.Report(), signal.signal(signal.SIGALRM, cut)
    code = BREAK.format(function="wgrad", where="True", what="time.sleep(600)")
    code += "\nopen('/proc/self/comm', 'w').write('jasper-checks')"
    try:
        with pytest.raises(OutOfTime):
            run_child(code, on_row=on_row, report=report)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    children = [p for p in Path("/proc").glob("[0-9]*/comm") if read_or_nothing(p) == "jasper-checks"]
    assert not children and ended == [(0.0, -signal.SIGKILL)]
    assert {row["op"] for row in report.rows} == {"bn_relu_dropout", "conv1d"}
    assert {row["op"] for row in report.decided()} == {"bn_relu_dropout"}, "of conv1d wgrad is missing"
    assert all(row["status"] == "ok" for row in report.rows)


def read_or_nothing(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def test_a_check_that_is_cut_off_in_the_first_second_ends_at_once(monkeypatch):
    """While the process still imports: nothing waits for its end."""
    ended = spy_on_ends(monkeypatch)

    def lines(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(probe, "_lines", lines)
    with pytest.raises(KeyboardInterrupt):
        run_child("time.sleep(600)")
    assert ended == [(0.0, -signal.SIGKILL)]


def spy_on_ends(monkeypatch) -> list[tuple[float, int | None]]:
    """Of every process that is ended: the seconds that its own end is waited for, and how it ended."""
    ended, end = [], probe._end

    def spied(process, before, after):
        status = end(process, before=before, after=after)
        ended.append((before, process.poll()))
        return status

    monkeypatch.setattr(probe, "_end", spied)
    return ended


def rows_of(*statuses: tuple[str, str]) -> tuple[list[dict], dict[str, dict]]:
    planned, found = [], {}
    for number, (op, status) in enumerate(statuses):
        check = Check(op, "triton", "forward", f"{number}", CONV, "float16").plain()
        planned.append(check)
        if status:
            found[check["id"]] = check | {"status": status, "detail": "", "share": 0.5, "ours": 0.0, "theirs": 0.0}
    return planned, found


def test_what_was_found_is_a_verdict_where_nothing_can_change_it():
    report = probe.Report(*rows_of(
        ("bn_relu_dropout", "ok"), ("conv1d", "ok"), ("conv1d", ""), ("conv1d.fused", "wrong"), ("conv1d.fused", ""),
        ("panes", ""),
    ))  # fmt: skip
    found = {v.op: v.status for v in verdict.judge(report.decided(), quick=True)}
    assert found == {"bn_relu_dropout": GOOD, "conv1d.fused": BAD}


@pytest.mark.slow
@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_cut_off_shows_and_keeps_what_was_found(as_json, monkeypatch, capsys):
    def supervise(device, *, report, **_more):
        report.planned, report.found = rows_of(("bn_relu_dropout", "ok"), ("conv1d", "ok"), ("conv1d", ""))
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "supervise", supervise)
    with pytest.raises(KeyboardInterrupt):
        show.main(CPU, quick=False, as_json=as_json, cache=True)
    said = capsys.readouterr().out
    if as_json:
        report = json.loads(said)
        assert not report["finished"] and len(report["rows"]) == 2 and len(report["verdicts"]) == 1
    else:
        assert "bn_relu_dropout (triton, float16): good" in said and "ended early: 2 checks were made" in said
    assert {name: v.status for name, v in verdicts.read(CPU).items()} == {
        ("bn_relu_dropout", "triton", "float16"): GOOD
    }


@pytest.mark.slow
def test_what_kernels_print_is_no_part_of_the_protocol():
    rows = run_child(BREAK.format(function="forward", where="True", what="print('jasper', end='', flush=True)"))
    assert {row["status"] for row in rows} == {"ok"}


@pytest.mark.slow
def test_a_process_that_does_not_start_is_no_verdict_on_a_kernel():
    with pytest.raises(probe.CannotCheck, match="ended with status 3, in no check: what a pity"):
        run_child("print('what a pity', file=sys.stderr); sys.exit(3)")


@pytest.mark.slow
def test_a_device_that_is_lost_on_the_way_leaves_what_was_not_checked_open(tmp_path):
    """The process dies in a kernel, and the next one does not start."""
    flag = tmp_path / "started"
    code = f"""
if os.path.exists({str(flag)!r}):
    sys.exit("no device any more")
open({str(flag)!r}, "w").close()
""" + BREAK.format(function="forward", where="True", what="os._exit(9)")
    rows = run_child(code)
    assert next(row["status"] for row in rows if row["function"] == "forward" and row["op"] == "conv1d") == "died"
    found = {v.op: v.status for v in verdict.judge(rows, quick=True)}
    assert found["conv1d"] == BAD


@pytest.mark.slow
def test_memory_that_runs_out_in_the_driver_is_no_fault_of_the_kernel():
    what = "print('CUDA error: out of memory', file=sys.stderr); sys.stderr.flush(); os._exit(1)"
    rows = run_child(BREAK.format(function="forward", where="True", what=what), ops=("conv1d",))
    assert verdict.judge(rows, quick=True)[0].status == UNCHECKED


# ---- the command ----


def command(*arguments: str, cache: Path, interpret: bool) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"JASPER_FAST_CACHE": str(cache)}
    env |= {"TRITON_INTERPRET": "1"} if interpret else {}
    argv = [sys.executable, "-m", "jasper_fast", "selfcheck", "--device", "cpu", *arguments]
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_checks_the_cpu_and_the_interpreted_kernels_and_keeps_the_verdicts(tmp_path):
    make_face("cpu"), interpreted()
    done = command("--quick", "--json", cache=tmp_path, interpret=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["finished"]
    assert {(v["op"], v["face"], v["dtype"]) for v in report["verdicts"]} == {("panes", "aten", "float32")} | {
        (op, *face) for op in verdict.OPS[:3] for face in (("cpu", "float32"), ("triton", "bfloat16"))
    } | {("panes", "cpu", "float32")}
    assert all(v["status"] == GOOD and v["quick"] for v in report["verdicts"])
    (file,) = (tmp_path / "verdicts").glob("*.json")
    kept = json.loads(file.read_text())
    assert kept["key"] == report["key"] and kept["verdicts"] == report["verdicts"]


@pytest.mark.slow
def test_the_command_checks_the_dtypes_that_it_is_told(tmp_path):
    make_face("cpu")
    done = command("--quick", "--dtype", "fp16", "--dtype", "bf16", "--json", cache=tmp_path, interpret=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert {(v["op"], v["face"], v["dtype"]) for v in report["verdicts"]} == {
        (op, face, dtype)
        for op, face in (("panes", "aten"), *((op, "cpu") for op in verdict.OPS[:3]))
        for dtype in ("float16", "bfloat16")
    }


@pytest.mark.slow
def test_the_command_shows_a_table(tmp_path):
    make_face("cpu")
    done = command("--quick", "--no-cache", cache=tmp_path, interpret=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "conv1d (cpu, float32): good" in done.stdout and "conv1d dgrad" in done.stdout
    assert not (tmp_path / "verdicts").exists(), "--no-cache"


@pytest.mark.slow
def test_a_failure_is_shown_and_is_the_exit_status(monkeypatch, capsys, tmp_path):
    make_face("cpu")
    code = BREAK.format(function="dgrad", where="True", what="return 1.01 * right(x, w, *rest, **more)")
    full = f"{MODULES}\n{code}\nchild.child()"
    argv = [sys.executable, "-c", full]
    monkeypatch.setattr(probe, "command", lambda: argv)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert show.main(CPU, quick=True, as_json=False, cache=True) == 1
    said = capsys.readouterr().out
    assert "conv1d dgrad default (2, 64->48, 37) K 11 float32 wrong: dx: max error" in said.replace("\n", " ")
    assert "conv1d (cpu, float32): bad" in said and "bn_relu_dropout (cpu, float32): good" in said
    assert verdicts.read(CPU)["conv1d", "cpu", "float32"].status == BAD
