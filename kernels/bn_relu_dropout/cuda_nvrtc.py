"""The ops of csrc/cuda/bn_relu_dropout.cu without the CUDA library: NVRTC compiles the same kernels at run time.

`cut` divides the work as `plan` in csrc/cuda/bn_relu_dropout.cuh does; tests/test_cuda_nvrtc.py compares the two.
"""

import ctypes
from types import ModuleType

import torch
from torch import Tensor

from jasper_fast.kernels import philox
from jasper_fast.kernels.nvrtc import BOOL, TYPES, Kernels, device_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
THREADS, MERGE_CHANNELS = 256, 32
# rows that a thread loads before it waits for them: in statistics and forward kernels, and in backward kernels
ROWS, BACKWARD_ROWS = 4, 2
_ACTIVATIONS = ("y", "residual", "z", "dz", "out", "dres")
_CHANNELS = ("mean", "rstd", "gamma", "beta", "mean_g", "mean_gy")
_PLAN = ("tx", "columns", "parts", "part_rows", "tiles", "tile_rows")


class Args(ctypes.Structure):
    """The struct `Args` of csrc/cuda/bn_relu_dropout.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_ACTIVATIONS, *_CHANNELS, "lengths", "seed", "partials")),
        ("threshold", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("n", "c", "t", *_PLAN)),
    ]


def cut(a: Args, width: int, rows: int, sms: int) -> None:
    """Sets the fields _PLAN of `a`: how the CTAs divide the work on a GPU with `sms` multiprocessors.

    A thread loads `rows` rows of `width` channels before it waits for them.
    """
    vectors = -(-max(1, a.c) // width)
    tx = next((tx for tx in (32, 16, 8) if vectors % tx == 0), min(32, 1 << (vectors - 1).bit_length()))
    columns, step, m = -(-vectors // tx), THREADS // tx * rows, a.n * a.t
    part_rows = -(-m // -(-4 * sms // columns))
    a.tx, a.columns, a.part_rows = tx, columns, -(-part_rows // step) * step
    a.parts = -(-m // a.part_rows) if m else 0
    turns = a.n * -(-a.t // step) * columns // (16 * sms)
    a.tile_rows = step * min(8, max(1, turns))
    a.tiles = -(-a.t // a.tile_rows)


class Compiled:
    """The ops, with the signatures of csrc/cuda/bn_relu_dropout.cu."""

    def __init__(self, nvrtc: ModuleType | None = None, driver: ModuleType | None = None) -> None:
        self._kernels = Kernels("bn_relu_dropout.cuh", nvrtc, driver)

    def bn_stats(self, y: Tensor, mean: Tensor, m2: Tensor) -> None:
        self._reduce(y, _args(y, {}), "stats_kernel", "", ROWS, mean, m2)

    def bn_forward(self, y, mean, rstd, gamma, beta, residual, lengths, seed, p, z) -> None:
        a = _args(
            y, {"residual": residual, "out": z, "mean": mean, "rstd": rstd, "gamma": gamma, "beta": beta},
            lengths, seed, p,
        )  # fmt: skip
        self._elementwise(y, a, "forward_kernel", f"{BOOL[seed is not None]}, {BOOL[residual is not None]}", ROWS)

    def bn_backward_reduce(
        self, dz, y, z, mean, rstd, gamma, beta, lengths, seed, p, dbeta, dgamma
    ) -> None:  # fmt: skip
        a = _args(y, {"dz": dz, "z": z, "mean": mean, "rstd": rstd, "gamma": gamma, "beta": beta}, lengths, seed, p)
        self._reduce(y, a, "reduce_kernel", _gate(z, seed), BACKWARD_ROWS, dbeta, dgamma)

    def bn_backward_apply(
        self, dz, y, z, mean, rstd, gamma, beta, mean_g, mean_gy, lengths, seed, p, dy, dres
    ) -> None:  # fmt: skip
        if (mean_g is None) != (mean_gy is None):
            raise ValueError("give both mean_g and mean_gy, or neither")
        if z is None and dres is not None:
            raise ValueError("z is needed where there is a residual: the sign of the sum cannot be computed from y")
        channels = {"mean": mean, "rstd": rstd, "gamma": gamma, "beta": beta, "mean_g": mean_g, "mean_gy": mean_gy}
        a = _args(y, {"dz": dz, "z": z, "out": dy, "dres": dres, **channels}, lengths, seed, p)
        self._elementwise(y, a, "apply_kernel", _gate(z, seed), BACKWARD_ROWS)

    def _reduce(self, y, a, kernel, flags, rows, first, second) -> None:
        width = _planned(y, a, rows)
        partials = torch.empty((a.parts, 2, a.c), dtype=torch.float32, device=y.device)
        a.partials = partials.data_ptr()
        self._launch(y, kernel, f"{width}{', ' if flags else ''}{flags}", a.parts * a.columns, a)
        self._launch(
            y, "merge_kernel", BOOL[kernel == "stats_kernel"], -(-a.c // MERGE_CHANNELS), a,
            ctypes.c_void_p(first.data_ptr()), ctypes.c_void_p(second.data_ptr()),
        )  # fmt: skip

    def _elementwise(self, y, a, kernel, flags, rows) -> None:
        width = _planned(y, a, rows)
        self._launch(y, kernel, f"{width}, {flags}", a.n * a.tiles * a.columns, a)

    def _launch(self, y, kernel, flags, grid, *arguments) -> None:
        if grid == 0:  # no channels or no rows
            return
        name = f"jf::bn::{kernel}<{TYPES[DTYPES.index(y.dtype)]}, {flags}>"
        with device_of(y) as stream:
            self._kernels.launch(name, grid, THREADS, 0, stream, *arguments)


def _gate(z: Tensor | None, seed: Tensor | None) -> str:
    return "jf::bn::Gate::" + ("z" if z is not None else "sign" if seed is None else "sign_dropout")


def _planned(y: Tensor, a: Args, rows: int) -> int:
    """Plans the launch with `cut`. Returns how many neighbouring channels a thread loads at once.

    They fill 16 bytes if all rows and pointers are aligned to 16 bytes. Otherwise a thread loads one channel.
    """
    width = 16 // y.element_size()
    if a.c % width or any((getattr(a, name) or 0) % 16 for name in (*_ACTIVATIONS, *_CHANNELS)):
        width = 1
    cut(a, width, rows, torch.cuda.get_device_properties(y.device).multi_processor_count)
    return width


def _args(
    y: Tensor,
    tensors: dict[str, Tensor | None],
    lengths: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> Args:
    """Returns the kernels' arguments. Raises ValueError or TypeError for arguments that the kernels do not take."""
    if y.dtype not in DTYPES:
        raise TypeError(f"the cuda face takes fp32, fp16 and bf16, got {y.dtype}; use backend='reference' for others")
    n, c, t = y.shape
    if n * t >= 1 << 31:
        raise ValueError(f"y has N*T = {n * t} rows, the cuda face takes fewer than 2^31: use a smaller batch")
    a = Args(threshold=philox.threshold(p), scale=1 / (1 - p), n=n, c=c, t=t)
    for name, x in {"y": y, **tensors}.items():
        if x is None:
            continue
        if name in _CHANNELS:
            if x.shape != (c,) or x.dtype != torch.float32 or not x.is_contiguous() or x.device != y.device:
                raise ValueError(f"{name} must be a contiguous fp32 tensor of C = {c} channels on the device of y")
        elif x.shape != y.shape or x.dtype != y.dtype or x.device != y.device or not x.transpose(1, 2).is_contiguous():
            raise ValueError(f"{name} must be {tuple(y.shape)} {y.dtype} on {y.device} in NTC memory (layout.ntc)")
        setattr(a, name, x.data_ptr())
    if (p > 0) != (seed is not None):
        raise ValueError("seed must be given if and only if p > 0")
    for name, x, count in (("lengths", lengths, n), ("seed", seed, 1)):
        if x is None:
            continue
        if x.dtype != torch.int64 or x.numel() != count or not x.is_contiguous() or x.device != y.device:
            raise TypeError(f"{name} must be a contiguous int64 tensor of {count} elements on the device of y")
        setattr(a, name, x.data_ptr())
    return a
