"""The functions that launch NovoGrad's CUDA kernels (those of the CUDA library or of NVRTC), and their arguments."""

import ctypes
import functools
from types import ModuleType

from jasper_fast.kernels import native, nvrtc

Pointer, Int = ctypes.c_void_p, ctypes.c_int
THREADS = 256  # threads of a CTA


class Args(ctypes.Structure):
    """The arguments of both kernels, with the layout of the struct in csrc/cuda/novograd.cuh."""

    _fields_ = [
        *((name, Pointer) for name in ("table", "runs", "anchor", "partial", "old", "settings")),
        *((name, Pointer) for name in ("scale", "found", "outcome")),
        *((name, Int) for name in ("size", "partials")),
        ("clip_norm", ctypes.c_float),
        *((name, Int) for name in ("guard", "has_averages")),
    ]


class Functions:
    """The functions of csrc/cuda/novograd.cu. Raises `native.Missing` if they are missing or take another `Args`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        try:
            size = library.jf_novograd_size()
        except AttributeError:  # the library is older than these kernels
            size = 0
        if size != ctypes.sizeof(Args):
            raise native.Missing(f"{library._name} is of another version than this code; {native.BUILD}")
        for name in ("jf_novograd_squares", "jf_novograd_update"):
            function = getattr(library, name)
            function.argtypes, function.restype = (Pointer, Int, ctypes.POINTER(Args)), ctypes.c_char_p
            setattr(self, name, function)


class Compiled:
    """The same functions as in `Functions`, for machines without the CUDA library: NVRTC compiles the kernels."""

    def __init__(self, nvrtc_: ModuleType | None = None, driver: ModuleType | None = None) -> None:
        self._kernels = nvrtc.Kernels("novograd.cuh", nvrtc_, driver)

    def jf_novograd_squares(self, stream: int | None, grid: int, args: Args) -> None:
        self._kernels.launch("jf::novograd::squares_kernel", grid, THREADS, 0, stream, args)

    def jf_novograd_update(self, stream: int | None, grid: int, args: Args) -> None:
        self._kernels.launch("jf::novograd::update_kernel", grid, THREADS, 0, stream, args)


@functools.cache
def functions() -> Functions | Compiled:
    """Returns the CUDA library's functions, else those that use NVRTC. Raises `native.Missing` if neither works."""
    return nvrtc.either(lambda: Functions(native.cuda_library()), Compiled)
