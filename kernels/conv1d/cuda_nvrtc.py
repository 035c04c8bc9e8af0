"""The functions of csrc/cuda/conv1d.cu without the CUDA library: NVRTC compiles the same kernels at run time."""

from types import ModuleType

from jasper_fast.kernels.conv1d.cuda_args import Args, Int, Launch, Long, Pointer, WgradArgs
from jasper_fast.kernels.nvrtc import BOOL, TYPES, Kernels


class Compiled:
    """The functions of csrc/cuda/conv1d.cu. CuPy cannot launch with attributes, so `early` has no effect."""

    def __init__(self, nvrtc: ModuleType | None = None, driver: ModuleType | None = None) -> None:
        self._kernels = Kernels("conv1d_launch.cuh", nvrtc, driver)

    def jf_conv1d(self, launch: Launch, dtype: int, mode: int, transposed: int, block: int, args: Args) -> None:
        name = f"jf::conv::conv_{launch.loop}<{TYPES[dtype]}, {mode}, {block}, {BOOL[transposed]}>"
        self._launch(launch, name, 384 if launch.loop == 90 else 128, args)

    def jf_conv1d_merge(self, launch: Launch, *arguments: object) -> None:
        self._launch(launch, "jf::conv::merge_kernel", 256, *map(Pointer, arguments[:4]), *map(Int, arguments[4:]))

    def jf_conv1d_wgrad(self, launch: Launch, dtype: int, taps: int, args: WgradArgs) -> None:
        loop = launch.loop
        self._launch(launch, f"jf::conv::wgrad_{loop}<{TYPES[dtype]}, {taps}>", 384 if loop == 90 else 128, args)

    def jf_conv1d_wgrad_merge(
        self, launch: Launch, dtype: int, parts: int, dw: int, shares: int, taps: int, pairs: int
    ) -> None:
        arguments = Pointer(parts), Pointer(dw), Int(shares), Int(taps), Long(pairs)
        self._launch(launch, f"jf::conv::wgrad_merge_kernel<{TYPES[dtype]}>", 128, *arguments)

    def jf_conv1d_pack(self, launch: Launch, of: int, to: int, weight: int, pack: int, *sizes: int) -> None:
        name = f"jf::conv::pack_kernel<{TYPES[of]}, {TYPES[to]}>"
        self._launch(launch, name, 256, Pointer(weight), Pointer(pack), *map(Int, sizes))

    def _launch(self, launch: Launch, name: str, threads: int, *arguments: object) -> None:
        self._kernels.launch(
            name, launch.grid, threads, launch.shared, launch.stream, *arguments, together=bool(launch.cooperative)
        )
