"""Launches the CUDA convs on the device of their data, on the current stream of that device."""

import ctypes
import functools

import torch
from torch import Tensor

from jasper_fast.kernels import native, nvrtc
from jasper_fast.kernels.conv1d import cuda_nvrtc, cuda_tiles
from jasper_fast.kernels.conv1d.cuda_args import Args, Int, Launch, Long, Pointer, WgradArgs

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SIGNATURES = {
    "jf_conv1d": (Int, Int, Int, Int, ctypes.POINTER(Args)),
    "jf_conv1d_merge": (Pointer, Pointer, Pointer, Pointer, Int, Int, Int, Int, Int, Int),
    "jf_conv1d_wgrad": (Int, Int, ctypes.POINTER(WgradArgs)),
    "jf_conv1d_wgrad_merge": (Int, Pointer, Pointer, Int, Int, Long),
    "jf_conv1d_pack": (Int, Int, Pointer, Pointer, Int, Int, Int),
}


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Returns `library` with the argument types of the functions of csrc/cuda/conv1d.cu.

    Raises `native.Missing` if the functions are missing or take other structs.
    """
    sizes = Int(), Int()
    if hasattr(library, "jf_conv1d_sizes"):  # else the library is older than these kernels
        library.jf_conv1d_sizes(*map(ctypes.byref, sizes))
    fits = [size.value for size in sizes] == [ctypes.sizeof(Args), ctypes.sizeof(WgradArgs)]
    return native.typed(library, fits, {name: (ctypes.POINTER(Launch), *of) for name, of in _SIGNATURES.items()})


@functools.cache
def functions() -> ctypes.CDLL | cuda_nvrtc.Compiled:
    """Returns the functions of the CUDA library, or if it cannot be used, the same functions compiled by NVRTC.

    Raises `native.Missing` if neither can be used.
    """
    return nvrtc.either(lambda: bind(native.cuda_library()), cuda_nvrtc.Compiled)


def way() -> str | None:
    """Returns where the kernels come from: "library", "NVRTC", or None if neither can be used."""
    try:
        return "NVRTC" if isinstance(functions(), cuda_nvrtc.Compiled) else "library"
    except native.Missing:
        return None


def takes(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int, int] | None = None) -> bool:
    """Returns whether the convs run on `device` in `dtype`.

    With `shape` (c_in, c_out, taps, stride, dilation), also whether that shape fits the GPU's shared memory.
    """
    on = gpu(device)
    if dtype != torch.float16 and (on.loop == 75 or dtype != torch.bfloat16):
        return False
    if shape is None:
        return True
    c_in, c_out, taps, stride, dilation = shape
    return cuda_tiles.fits(on, cuda_tiles.Work(1, 1, max(c_in, c_out), c_out, 0, taps, stride, dilation))


@functools.cache
def gpu(device: torch.device) -> cuda_tiles.Gpu:
    """Returns the properties of `device` on which plans depend."""
    p = torch.cuda.get_device_properties(device)
    loop = 90 if p.major == 9 else 80 if p.major >= 8 else 75
    products = cuda_tiles.PRODUCTS[loop] // (2 if (p.major, p.minor) in cuda_tiles.HALF_RATE else 1)
    return cuda_tiles.Gpu(loop, p.multi_processor_count, p.shared_memory_per_block_optin, p.L2_cache_size, products)


def run(
    name: str,
    like: Tensor,
    grid: int,
    shared: int,
    *args: object,
    cooperative: bool = False,
    early: bool = False,
    loop: int = 0,
) -> None:
    """Calls C function `name`. It launches `grid` CTAs with `shared` bytes of shared memory on the device of `like`.

    early: the launch may begin while the launch before it in the stream still runs, on GPUs that can (sm_90 and later).
    """
    on = gpu(like.device)
    if shared > on.shared:
        raise RuntimeError(f"{name} needs {shared} bytes of shared memory, but a block of this GPU has {on.shared}")
    with nvrtc.device_of(like) as stream:
        launch = Launch(loop, grid, shared, cooperative, early, stream)
        if (error := getattr(functions(), name)(launch, *args)) is not None:
            raise RuntimeError(f"{name}: {error.decode()}")
