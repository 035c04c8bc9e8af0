"""The functions of csrc/cuda/conv1d.cu without the CUDA library: NVRTC compiles the same kernels at run time."""

import ctypes
from types import ModuleType

from jasper_fast.kernels.conv1d.cuda_args import Args, Launch, WgradArgs
from jasper_fast.kernels.nvrtc import BOOL, TYPES, Kernels


class Compiled:
    """The same functions as `cuda_launch.Functions`. CuPy cannot launch with attributes, so `early` has no effect."""

    def __init__(self, nvrtc: ModuleType | None = None, driver: ModuleType | None = None) -> None:
        self._kernels = Kernels("conv1d_launch.cuh", nvrtc, driver)

    def jf_conv1d(self, launch: Launch, dtype: int, mode: int, transposed: int, block: int, args: Args) -> None:
        name = f"jf::conv::conv_{launch.loop}<{TYPES[dtype]}, {mode}, {block}, {BOOL[transposed]}>"
        self._launch(launch, name, 384 if launch.loop == 90 else 128, args)

    def jf_conv1d_merge(self, launch: Launch, *arguments: object) -> None:
        self._launch(launch, "jf::conv::merge_kernel", 256, *map(_pointer, arguments[:4]), *map(_int, arguments[4:]))

    def jf_conv1d_wgrad(self, launch: Launch, dtype: int, taps: int, args: WgradArgs) -> None:
        loop = launch.loop
        self._launch(launch, f"jf::conv::wgrad_{loop}<{TYPES[dtype]}, {taps}>", 384 if loop == 90 else 128, args)

    def jf_conv1d_wgrad_merge(self, launch: Launch, dtype: int, parts: int, dw: int, *sizes: int) -> None:
        *counts, pairs = sizes
        arguments = _pointer(parts), _pointer(dw), *map(_int, counts), ctypes.c_int64(pairs)
        self._launch(launch, f"jf::conv::wgrad_merge_kernel<{TYPES[dtype]}>", 128, *arguments)

    def jf_conv1d_pack(self, launch: Launch, of: int, to: int, weight: int, pack: int, *sizes: int) -> None:
        name = f"jf::conv::pack_kernel<{TYPES[of]}, {TYPES[to]}>"
        self._launch(launch, name, 256, _pointer(weight), _pointer(pack), *map(_int, sizes))

    def _launch(self, launch: Launch, name: str, threads: int, *arguments: object) -> None:
        how = launch.grid, threads, launch.shared, launch.stream
        self._kernels.launch(name, *how, *arguments, together=bool(launch.cooperative))


def _pointer(value: int | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(value)


def _int(value: int) -> ctypes.c_int:
    return ctypes.c_int(value)
