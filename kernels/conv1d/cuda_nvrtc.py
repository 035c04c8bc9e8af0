"""The CUDA convs without a CUDA toolkit: the same sources, compiled by NVRTC at their first use, launched through CuPy.

Compiled kernels are kept in `$XDG_CACHE_HOME/jasper_fast/nvrtc` (else `~/.cache`), by architecture, NVRTC and sources.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch

from jasper_fast.kernels.conv1d.cuda_args import Args, Launch, WgradArgs

_TYPES = ("float", "__half", "__nv_bfloat16")  # by the numbers of cuda_launch.DTYPES
_BOOL = ("false", "true")


def missing() -> str | None:
    """Why this way is not to be had, or None."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: pip install 'jasper-fast[cuda]'"
    return None


def sources() -> Path:
    """The folder of the kernels' sources: a checkout's, or the installed package's."""
    root = Path(__file__).resolve().parents[2]
    return root / "csrc" / "cuda"


@functools.cache
def digest() -> str:
    """Of the kernels' sources."""
    found = hashlib.sha256()
    for path in sorted(sources().glob("*.cuh")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "jasper_fast" / "nvrtc"


def options() -> list[str]:
    """NVRTC's options beside the architecture: the language, our sources, CUDA's headers, CuPy's copy of libcu++."""
    cupy = Path(importlib.util.find_spec("cupy").origin).parent
    folders = [sources(), cupy / "_core/include/cupy/_cccl/libcudacxx"]
    if home := os.environ.get("CUDA_PATH") or os.environ.get("CUDA_HOME"):
        folders.append(Path(home) / "include")
    nvidia = importlib.util.find_spec("nvidia")  # the wheels' headers, which a pip user has with CuPy's NVRTC
    for folder in nvidia.submodule_search_locations if nvidia else ():
        folders += sorted(Path(folder).glob("*/include"))
    return ["-std=c++20", *(f"-I{folder}" for folder in folders if folder.is_dir())]


def compile_kernel(name: str, arch: str, nvrtc: ModuleType) -> tuple[bytes, str]:
    """The machine code of kernel `name` (a C++ expression) for `arch` ("sm_90a"), and its symbol; kept on disk.

    Raises RuntimeError with the compiler's words.
    """
    version = ".".join(map(str, nvrtc.getVersion()))
    key = hashlib.sha256("\0".join((name, arch, version, digest())).encode()).hexdigest()[:32]
    kept = _cache() / f"{key}.cubin"
    if kept.exists():
        symbol, _, code = kept.read_bytes().partition(b"\n")
        return code, symbol.decode()
    program = nvrtc.createProgram('#include "conv1d_launch.cuh"\n', "conv1d.cu", [], [])
    try:
        nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, [f"-arch={arch}", *options()])
        except nvrtc.NVRTCError as error:
            said = nvrtc.getProgramLog(program).strip()
            raise RuntimeError(f"NVRTC {version} does not compile {name} for {arch}: {error}\n{said[:2000]}") from None
        code, symbol = bytes(nvrtc.getCUBIN(program)), nvrtc.getLoweredName(program, name)
    finally:
        nvrtc.destroyProgram(program)
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(symbol.encode() + b"\n" + code)
    os.replace(part, kept)
    return code, symbol


class Compiled:
    """The functions of csrc/cuda/conv1d.cu over NVRTC and CUDA's driver, by CuPy or what stands for it."""

    def __init__(self, nvrtc: ModuleType | None = None, driver: ModuleType | None = None) -> None:
        if nvrtc is None or driver is None:
            from cupy.cuda import nvrtc
            from cupy_backends.cuda.api import driver
        self._nvrtc, self._driver = nvrtc, driver
        self._functions: dict[tuple[int, str], int] = {}

    def jf_conv1d(self, launch: Launch, dtype: int, mode: int, transposed: int, block: int, args: Args) -> None:
        name = f"jf::conv::conv_{launch.loop}<{_TYPES[dtype]}, {mode}, {block}, {_BOOL[transposed]}>"
        self._launch(launch, name, 384 if launch.loop == 90 else 128, args)

    def jf_conv1d_merge(self, launch: Launch, *arguments: object) -> None:
        self._launch(launch, "jf::conv::merge_kernel", 256, *map(_pointer, arguments[:4]), *map(_int, arguments[4:]))

    def jf_conv1d_wgrad(self, launch: Launch, dtype: int, taps: int, args: WgradArgs) -> None:
        loop = launch.loop
        self._launch(launch, f"jf::conv::wgrad_{loop}<{_TYPES[dtype]}, {taps}>", 384 if loop == 90 else 128, args)

    def jf_conv1d_wgrad_merge(self, launch: Launch, dtype: int, parts: int, dw: int, *sizes: int) -> None:
        *counts, pairs = sizes
        arguments = _pointer(parts), _pointer(dw), *map(_int, counts), ctypes.c_int64(pairs)
        self._launch(launch, f"jf::conv::wgrad_merge_kernel<{_TYPES[dtype]}>", 128, *arguments)

    def jf_conv1d_pack(self, launch: Launch, of: int, to: int, weight: int, pack: int, *sizes: int) -> None:
        name = f"jf::conv::pack_kernel<{_TYPES[of]}, {_TYPES[to]}>"
        self._launch(launch, name, 256, _pointer(weight), _pointer(pack), *map(_int, sizes))

    def _launch(self, launch: Launch, name: str, threads: int, *arguments: object) -> None:
        driver, function = self._driver, self._function(name)
        driver.funcSetAttribute(function, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, launch.shared)
        places = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        how = (function, launch.grid, 1, 1, threads, 1, 1, launch.shared, launch.stream or 0, ctypes.addressof(places))
        if launch.cooperative:
            driver.launchCooperativeKernel(*how)
        else:
            driver.launchKernel(*how, 0)

    def _function(self, name: str) -> int:
        """The kernel on the current device, compiled and loaded at its first use."""
        device = torch.cuda.current_device()
        if (device, name) not in self._functions:
            major, minor = torch.cuda.get_device_capability(device)
            arch = f"sm_{major}{minor}" + ("a" if major == 9 else "")
            code, symbol = compile_kernel(name, arch, self._nvrtc)
            module = self._driver.moduleLoadData(code)  # stays loaded as long as the process
            self._functions[device, name] = self._driver.moduleGetFunction(module, symbol)
        return self._functions[device, name]


def _pointer(value: int | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(value)


def _int(value: int) -> ctypes.c_int:
    return ctypes.c_int(value)
