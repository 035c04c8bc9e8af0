"""Runs the kernels of csrc/cuda without a CUDA toolkit: NVRTC compiles them at their first use, CuPy launches them.

Compiled kernels are kept in the folder `nvrtc` of the cache (`files.cache`), separately for each architecture, version
of NVRTC and content of the sources.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from jasper_fast.kernels import files, launch, native

TYPES = ("float", "__half", "__nv_bfloat16")  # fp32, fp16, bf16 in C++
BOOL = ("false", "true")


def missing() -> str | None:
    """Returns why NVRTC cannot be used, or None if it can."""
    return None if importlib.util.find_spec("cupy") else "CuPy is not installed: pip install 'jasper-fast[cuda]'"


def sources() -> Path:
    """Returns the folder of the kernels' sources, in the checkout or the installed package."""
    return Path(__file__).resolve().parents[1] / "csrc" / "cuda"


def either(library: Callable[[], Any], compiled: Callable[[], Any]) -> Any:
    """Returns the functions of the CUDA library, or if it cannot be used, the same functions compiled by NVRTC.

    If neither can be used, raises `native.Missing`, which says what is missing. NVRTC needs a GPU.
    """
    try:
        return library()
    except native.Missing as error:
        if not torch.cuda.is_available():
            raise
        if (why := missing()) is not None:
            raise native.Missing(f"{error}; or use NVRTC, which needs no toolkit: {why}") from None
        return compiled()


@functools.cache
def digest() -> str:
    """Returns a hash of the kernels' sources."""
    content = b"".join(path.name.encode() + b"\0" + path.read_bytes() for path in sorted(sources().glob("*.cuh")))
    return hashlib.sha256(content).hexdigest()[:16]


def options() -> list[str]:
    """Returns NVRTC's options except the architecture: the language and the folders of all headers."""
    cupy = Path(importlib.util.find_spec("cupy").origin).parent
    folders = [sources(), cupy / "_core/include/cupy/_cccl/libcudacxx"]
    if home := os.environ.get("CUDA_PATH") or os.environ.get("CUDA_HOME"):
        folders.append(Path(home) / "include")
    nvidia = importlib.util.find_spec("nvidia")  # CUDA's headers in NVIDIA's wheels, which pip installs with NVRTC
    for folder in nvidia.submodule_search_locations if nvidia else ():
        folders += sorted(Path(folder).glob("*/include"))
    return ["-std=c++20", *(f"-I{folder}" for folder in folders if folder.is_dir())]


def compile_kernel(header: str, name: str, arch: str, nvrtc: ModuleType) -> tuple[bytes, str]:
    """Returns the machine code of kernel `name` (a C++ expression) in `header` for `arch` ("sm_90a"), and its symbol.

    The result is kept on disk. If the kernel does not compile, raises RuntimeError with the compiler's message.
    """
    version = ".".join(map(str, nvrtc.getVersion()))
    key = hashlib.sha256("\0".join((header, name, arch, version, digest())).encode()).hexdigest()[:32]
    kept = files.cache() / "nvrtc" / f"{key}.cubin"
    if kept.exists():
        symbol, _, code = kept.read_bytes().partition(b"\n")
        return code, symbol.decode()
    program = nvrtc.createProgram(f'#include "{header}"\n', f"{Path(header).stem}.cu", [], [])
    try:
        nvrtc.addNameExpression(program, name)
        nvrtc.compileProgram(program, [f"-arch={arch}", *options()])
        code, symbol = bytes(nvrtc.getCUBIN(program)), nvrtc.getLoweredName(program, name)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).strip()
        raise RuntimeError(f"NVRTC {version} does not compile {name} for {arch}: {error}\n{log[:2000]}") from None
    finally:
        nvrtc.destroyProgram(program)
    files.write(kept, symbol.encode() + b"\n" + code)
    return code, symbol


@contextlib.contextmanager
def device_of(x: Tensor) -> Iterator[int | None]:
    """A context that makes the device of `x` current and yields its current stream, or None for a tensor on a CPU.

    On a CPU the kernels are emulated (csrc/cuda/emulate).
    """
    with launch.on_device_of(x):
        yield torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None


class Kernels:
    """The kernels in one header, compiled by NVRTC and launched by CUDA's driver, through CuPy's modules by default."""

    def __init__(self, header: str, nvrtc: ModuleType | None = None, driver: ModuleType | None = None) -> None:
        if nvrtc is None or driver is None:
            from cupy.cuda import nvrtc
            from cupy_backends.cuda.api import driver
        self._header, self._nvrtc, self._driver = header, nvrtc, driver
        self._functions: dict[tuple[int, str], int] = {}

    def launch(
        self,
        name: str,
        grid: int,
        threads: int,
        shared: int,
        stream: int | None,
        *arguments: object,
        together: bool = False,
    ) -> None:
        """Launches kernel `name` on the current device with `arguments` of ctypes types.

        With `together` the launch is cooperative: all CTAs run at the same time.
        """
        driver = self._driver
        if not driver.ctxGetCurrent():  # In a thread that has run nothing on the GPU, let torch create a context.
            torch.cuda.current_stream().synchronize()
        function = self._function(name)
        driver.funcSetAttribute(function, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
        places = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        how = (function, grid, 1, 1, threads, 1, 1, shared, stream or 0, ctypes.addressof(places))
        if together:
            driver.launchCooperativeKernel(*how)
        else:
            driver.launchKernel(*how, 0)

    def _function(self, name: str) -> int:
        """Returns the kernel's handle on the current device. The kernel is compiled and loaded at its first use."""
        device = torch.cuda.current_device()
        if (device, name) not in self._functions:
            major, minor = torch.cuda.get_device_capability(device)
            arch = f"sm_{major}{minor}" + ("a" if major == 9 else "")
            code, symbol = compile_kernel(self._header, name, arch, self._nvrtc)
            module = self._driver.moduleLoadData(code)  # stays loaded until the process ends
            self._functions[device, name] = self._driver.moduleGetFunction(module, symbol)
        return self._functions[device, name]
