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


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Returns `library` with the argument types of the functions of csrc/cuda/novograd.cu.

    Raises `native.Missing` if the functions are missing or take another `Args`.
    """
    size = library.jf_novograd_size() if hasattr(library, "jf_novograd_size") else 0  # 0: older than these kernels
    arguments = Pointer, Int, ctypes.POINTER(Args)
    return native.typed(
        library, size == ctypes.sizeof(Args), {"jf_novograd_squares": arguments, "jf_novograd_update": arguments}
    )


class Compiled:
    """The same functions for machines without the CUDA library: NVRTC compiles the kernels."""

    def __init__(self, nvrtc_: ModuleType | None = None, driver: ModuleType | None = None) -> None:
        self._kernels = nvrtc.Kernels("novograd.cuh", nvrtc_, driver)

    def jf_novograd_squares(self, stream: int | None, grid: int, args: Args) -> None:
        self._kernels.launch("jf::novograd::squares_kernel", grid, THREADS, 0, stream, args)

    def jf_novograd_update(self, stream: int | None, grid: int, args: Args) -> None:
        self._kernels.launch("jf::novograd::update_kernel", grid, THREADS, 0, stream, args)


@functools.cache
def functions() -> ctypes.CDLL | Compiled:
    """Returns the CUDA library's functions, else those that use NVRTC. Raises `native.Missing` if neither works."""
    return nvrtc.either(lambda: bind(native.cuda_library()), Compiled)
