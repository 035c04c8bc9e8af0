"""The CUDA kernels without a toolkit: stand-ins for NVRTC and the driver check what is compiled and launched.

If CuPy is installed, NVRTC itself compiles some kernels.
"""

import ctypes
import functools
import importlib.util
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import conv_cases
import cuda_host
import pytest
import test_bn_relu_dropout as norm_cases
import torch
from conftest import assert_raises, raising
from test_conv1d_cuda import (
    DIRECTIONS,
    FUSED,
    check_inference,
    emulate,
    functions as conv_functions,  # noqa: F401 (a fixture)
)
from test_cuda_emulated import Emulated
from test_novograd import emulated as emulated_steps, make, run, settings

from jasper_fast.kernels import native, nvrtc
from jasper_fast.kernels.bn_relu_dropout import cuda_impl as norms, cuda_nvrtc as norms_nvrtc
from jasper_fast.kernels.bn_relu_dropout.native_face import NativeFace
from jasper_fast.kernels.conv1d import cuda_launch, cuda_nvrtc
from jasper_fast.kernels.conv1d.cuda_args import Args, Launch, WgradArgs
from jasper_fast.kernels.layout import ntc
from jasper_fast.kernels.novograd import cuda_impl as novograd, cuda_launch as steps

THREADS = {"conv_75": 128, "conv_80": 128, "conv_90": 384, "wgrad_75": 128, "wgrad_80": 128, "wgrad_90": 384,
           "merge_kernel": 256, "wgrad_merge_kernel": 128, "pack_kernel": 256}  # fmt: skip
DTYPES = {"float": 0, "__half": 1, "__nv_bfloat16": 2}


class Nvrtc:
    """A stand-in for NVRTC whose compiled code is the kernel's name. `compiled` lists what it compiled."""

    class NVRTCError(RuntimeError):
        """A stand-in for the exception of NVRTC's module."""

    def __init__(self, fails: bool = False) -> None:
        self.compiled: list[tuple[str, str]] = []
        self.fails = fails

    def getVersion(self) -> tuple[int, int]:
        return 13, 0

    def createProgram(self, source: str, *_: object) -> SimpleNamespace:
        assert source in [f'#include "{name}.cuh"\n' for name in ("conv1d_launch", "bn_relu_dropout", "novograd")]
        return SimpleNamespace(name="")

    def addNameExpression(self, program: SimpleNamespace, name: str) -> None:
        program.name = name

    def compileProgram(self, program: SimpleNamespace, options: list[str]) -> None:
        if self.fails:
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION")
        self.compiled.append((program.name, options[0]))

    def getProgramLog(self, program: SimpleNamespace) -> str:
        return "line 3: expected a semicolon"

    def getCUBIN(self, program: SimpleNamespace) -> bytes:
        return program.name.encode()

    def getLoweredName(self, program: SimpleNamespace, name: str) -> str:
        return name

    def destroyProgram(self, program: SimpleNamespace) -> None:
        pass


def values(places, *kinds: type) -> list:
    """Returns the arguments of a launch: the values of these kinds that `places` point to."""
    return [ctypes.cast(places[i], ctypes.POINTER(kind)).contents for i, kind in enumerate(kinds)]


class Driver:
    """A stand-in for the driver: runs emulated kernels with the arguments that a launch points to.

    `functions` are those of the emulated face of conv1d or NovoGrad, or the library of the emulated batch norms.
    """

    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self, functions: object) -> None:
        self.functions, self.names, self.shared = functions, [], {}
        self.cooperative = 0

    def ctxGetCurrent(self) -> int:
        return 1

    def moduleLoadData(self, code: bytes) -> bytes:
        return code

    def moduleGetFunction(self, module: bytes, symbol: str) -> int:
        assert module.decode() == symbol
        self.names.append(symbol)
        return len(self.names) - 1

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:
        self.shared[function] = value

    def launchCooperativeKernel(self, *how: int) -> None:
        self.cooperative += 1
        self._launch(*how, cooperative=1)

    def launchKernel(self, *how: int) -> None:
        assert how[-1] == 0
        self._launch(*how[:-1], cooperative=0)

    def _launch(self, f, gx, gy, gz, bx, by, bz, shared, stream, params, cooperative) -> None:
        of, kernel, words = re.fullmatch(r"jf::(\w+)::(\w+?)(?:<(.*)>)?", self.names[f]).groups()
        assert (gy, gz, by, bz, stream) == (1, 1, 1, 1, 0)
        assert shared == self.shared[f] and bx == THREADS.get(kernel, 256) and (of == "conv" or shared == 0)
        words = [word.strip() for word in (words or "").split(",")]
        launch = Launch(int(kernel[-2:]) if kernel[-2:].isdigit() else 80, gx, shared, cooperative, 0, None)
        error = getattr(self, of)(kernel, words, launch, ctypes.cast(params, ctypes.POINTER(ctypes.c_void_p)))
        assert error is None, error

    def conv(self, kernel: str, words: list[str], launch: Launch, places) -> bytes | None:
        def plain(*kinds: type) -> list[int]:
            return [value.value for value in values(places, *kinds)]

        pointer, number, long, call = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, self.functions
        if kernel.startswith("conv_"):
            dtype, mode, block, transposed = words
            how = DTYPES[dtype], int(mode), transposed == "true", int(block)
            return call.jf_conv1d(launch, *how, *values(places, Args))
        if kernel == "merge_kernel":
            return call.jf_conv1d_merge(launch, *plain(*[pointer] * 4, *[number] * 6))
        if kernel == "wgrad_merge_kernel":
            return call.jf_conv1d_wgrad_merge(launch, DTYPES[words[0]], *plain(pointer, pointer, number, number, long))
        if kernel == "pack_kernel":
            return call.jf_conv1d_pack(launch, *map(DTYPES.get, words), *plain(pointer, pointer, *[number] * 3))
        return call.jf_conv1d_wgrad(launch, DTYPES[words[0]], int(words[1]), *values(places, WgradArgs))

    def bn(self, kernel: str, words: list[str], launch: Launch, places) -> bytes | None:
        args = places[0] and ctypes.c_void_p(places[0])
        outs = values(places, *[ctypes.c_void_p] * 3)[1:] if kernel == "merge_kernel" else (None, None)
        how = DTYPES[words[0]], " ".join(words[1:]).encode(), ctypes.c_int64(launch.grid), args
        return self.functions.jf_bn_kernel(kernel.removesuffix("_kernel").encode(), *how, *outs)

    def novograd(self, kernel: str, words: list[str], launch: Launch, places) -> bytes | None:
        launched = getattr(self.functions, f"jf_novograd_{kernel.removesuffix('_kernel')}")
        return launched(0, launch.grid, *values(places, steps.Args))


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "options", lambda: [])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return tmp_path / "jasper_fast" / "nvrtc"


@pytest.mark.parametrize("loop", [75, 80, 90])
def test_launches_through_the_driver(monkeypatch, conv_functions, cache: Path, loop: int) -> None:  # noqa: F811
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(loop, 10))
    compiler, driver = Nvrtc(), Driver(conv_functions)
    compiled = cuda_nvrtc.Compiled(compiler, driver)
    for name in ("k11", "prologue"):
        emulate(monkeypatch, compiled, loop)
        for direction, check in DIRECTIONS.items():
            if direction != "x" or name == "k11":
                check(conv_cases.LAYERS[name], torch.float16)
    emulate(monkeypatch, compiled, loop, 64)
    check_inference(conv_cases.LAYERS["k25"], *FUSED["shared"][1:], torch.float16)
    assert driver.cooperative
    assert {options for _, options in compiler.compiled} == {f"-arch=sm_{loop}{'a' if loop == 90 else ''}"}
    assert len(set(compiler.compiled)) == len(compiler.compiled) == len(list(cache.iterdir()))

    again = Nvrtc()  # as in a new process: the code is found on disk
    emulate(monkeypatch, cuda_nvrtc.Compiled(again, Driver(conv_functions)), loop)
    DIRECTIONS["forward"](conv_cases.LAYERS["k11"], torch.float16)
    assert again.compiled == []


def test_a_compile_that_fails_says_what_nvrtc_said(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    with pytest.raises(RuntimeError, match=r"NVRTC 13\.0 does not compile f<1> for sm_80.*\n.*expected a semicolon"):
        nvrtc.compile_kernel("conv1d_launch.cuh", "f<1>", "sm_80", Nvrtc(fails=True))
    assert not cache.exists() or not any(cache.iterdir())


def test_without_library_and_without_cupy_both_ways_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("cuda_library", "cuda"):
        monkeypatch.setattr(native, library, raising(native.Missing("backend 'cuda': not built")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nvrtc, "missing", lambda: "CuPy is not installed: pip install 'jasper-fast[cuda]'")
    for way in (cuda_launch.functions, norms._ops):
        with pytest.raises(native.Missing, match=r"not built; or use NVRTC, .*: CuPy is not installed: pip install"):
            way.__wrapped__()


def tell_sizes(args, wgrad_args) -> None:
    args._obj.value, wgrad_args._obj.value = ctypes.sizeof(Args), ctypes.sizeof(WgradArgs)


@pytest.mark.parametrize("launches", [cuda_launch, steps])
@pytest.mark.parametrize(
    "functions",
    [
        {},
        {"jf_conv1d_sizes": lambda *_: None, "jf_novograd_size": lambda: 8},
        {"jf_conv1d_sizes": tell_sizes, "jf_novograd_size": lambda: ctypes.sizeof(steps.Args)},
    ],
)
def test_a_library_of_another_version_is_refused(launches, functions, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library has none of the kernels, kernels with other arguments, or only the functions that tell the sizes of
    the arguments. CuPy is not installed."""
    monkeypatch.setattr(native, "cuda_library", lambda: SimpleNamespace(_name="libjasper_fast_cuda.so", **functions))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nvrtc, "missing", lambda: "CuPy is not installed")
    with pytest.raises(native.Missing, match=r"libjasper_fast_cuda.so was built from another .*CuPy is not installed"):
        launches.functions.__wrapped__()


# ---- batch norms ---------------------------------------------------------------------------------------------------


NORMS = cuda_host.CSRC / "cuda/emulate/bn_relu_dropout.cpp"


@pytest.fixture
def norm_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(cuda_host.build([NORMS])))
    library.jf_bn_kernel.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize(
    ("n", "c", "t", "dtype"),
    [(2, 64, 37, torch.float16), (2, 29, 19, torch.float32), (3, 200, 21, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("full", [False, True])
def test_norms_through_the_driver(monkeypatch, norm_library, cache, n, c, t, dtype, full) -> None:
    """The results must have the same bits as those of the emulated face, whose launches are planned in C++."""
    compiler = Nvrtc()
    ops = norms_nvrtc.Compiled(compiler, Driver(norm_library))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))
    emulated = Emulated(cuda_host.build([NORMS]))
    how = {"residual": True, "lengths": [t, 5, 0][:n], "p": 0.3} if full else {}
    case = norm_cases.make(n, c, t, dtype=dtype, device="cpu", **how)
    for training in (True, False):
        norm_cases.assert_same(*(norm_cases.run(of, case, training) for of in (NativeFace(lambda: ops), emulated)))
    assert {options for _, options in compiler.compiled} == {"-arch=sm_90a"}


def test_norms_are_cut_as_by_the_library(norm_library: ctypes.CDLL) -> None:
    for n, c, t, width, rows, sms in itertools.product(
        (1, 3, 32), (1, 29, 200, 768), (1, 70, 835), (1, 4, 8), (2, 4), (2, 132)
    ):
        ours, theirs = norms_nvrtc.Args(n=n, c=c, t=t), (ctypes.c_int * 6)()
        norms_nvrtc.cut(ours, width, rows, sms)
        norm_library.jf_bn_plan(n, c, t, width, rows, sms, theirs)
        assert [getattr(ours, name) for name in norms_nvrtc._PLAN] == list(theirs), (n, c, t, width, rows, sms)


def test_norms_refuse_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = norms_nvrtc.Compiled(Nvrtc(), object())
    y, c = ntc(torch.randn(2, 8, 5)), torch.randn(8)
    forward = functools.partial(ops.bn_forward, y, c, c, c, c, None, None, None)
    backward = functools.partial(ops.bn_backward_apply, y, y, None, c, c, c, c, None, None, None, None, 0.0, y)
    assert_raises([
        (lambda: forward(0.0, y.contiguous()), "NTC memory"),
        (lambda: forward(0.0, y.half()), "must be"),
        (lambda: forward(0.0, y[:1]), "must be"),
        (lambda: forward(0.5, y), "seed must be given"),
        (lambda: backward(y), "z is needed where there is a residual"),
    ])  # fmt: skip
    assert_raises([(lambda: ops.bn_stats(y.double(), c, c), "use backend='reference'")], TypeError)


# ---- NovoGrad ------------------------------------------------------------------------------------------------------


def test_a_step_through_the_driver(monkeypatch, cache) -> None:
    """The results must have the same bits as those of the library's functions."""
    compiler, library, results = Nvrtc(), emulated_steps(), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for functions in (steps.Compiled(compiler, Driver(library)), library):
        monkeypatch.setattr(steps, "functions", lambda functions=functions: functions)
        tensors, watched = make(torch.device("cpu"))
        outcome = run(novograd.step, tensors, watched, [settings(beta2=0.5)], scale=4.0, clip=1.0)
        results.append([outcome, *tensors.params, *tensors.exp_avgs, *tensors.averages, *watched.averages])
    assert all(map(torch.equal, *results)) and outcome[1] == 0
    assert compiler.compiled == [(f"jf::novograd::{name}_kernel", "-arch=sm_75") for name in ("squares", "update")]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed (extra 'cuda')")
@pytest.mark.parametrize(("arch", "name"), [
    ("sm_75", "jf::conv::conv_75<__half, 1, 64, false>"), ("sm_80", "jf::conv::conv_80<__half, 1, 64, false>"),
    ("sm_90a", "jf::conv::conv_90<__half, 1, 104, false>"), ("sm_90a", "jf::conv::wgrad_90<__nv_bfloat16, 3>"),
    ("sm_75", "jf::bn::reduce_kernel<__half, 8, jf::bn::Gate::sign_dropout>"),
    ("sm_90a", "jf::bn::forward_kernel<__nv_bfloat16, 8, true, true>"), ("sm_90a", "jf::bn::merge_kernel<float, true>"),
    ("sm_75", "jf::novograd::squares_kernel"), ("sm_90a", "jf::novograd::update_kernel"),
])  # fmt: skip
def test_nvrtc_compiles_the_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arch: str, name: str) -> None:
    from cupy.cuda import nvrtc as compiler

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    header = {"bn": "bn_relu_dropout.cuh", "conv": "conv1d_launch.cuh", "novograd": "novograd.cuh"}[name.split("::")[1]]
    code, symbol = nvrtc.compile_kernel(header, name, arch, compiler)
    assert code[:4] == b"\x7fELF" and symbol.startswith(("_ZN2jf4conv", "_ZN2jf2bn", "_ZN2jf8novograd"))
