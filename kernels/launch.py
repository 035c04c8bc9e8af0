"""Launches all Triton kernels: on the device of their data, on its current stream."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """A launch that was recorded instead of run. The fields are the arguments of `run`, without `like`."""

    kernel: object
    grid: tuple[int, ...]
    args: tuple[object, ...]
    meta: dict[str, object]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__

    @property
    def arguments(self) -> dict[str, object]:
        """The kernel's arguments, constexprs and compiler options by name."""
        names = [name for name in self.kernel.arg_names if name not in self.meta]
        return dict(zip(names, self.args, strict=True)) | self.meta


# the arguments of the innermost `recorded`, or None outside of it
_take: Callable[[Launch], object] | None = None
_arch: int | None = None


def run(kernel: object, grid: Sequence[int], like: Tensor, *args: object, **meta: object) -> None:
    """Launches `kernel` with `grid` programs on the device of `like`.

    `args` and `meta` are the kernel's arguments. `meta` may also have options of Triton's compiler.
    """
    meta["enable_fp_fusion"] = True  # a * b + c is one instruction; Triton 3.10 will not do this by default
    if _take is not None:
        _take(Launch(kernel, tuple(grid), args, meta))
        return
    with on_device_of(like):  # Triton launches on the current device
        kernel[tuple(grid)](*args, **meta)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Returns a context that makes the device of `x` current if it is a GPU."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    return torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext()


@contextlib.contextmanager
def recorded(take: Callable[[Launch], object], arch: int | None = None) -> Iterator[None]:
    """A context in which each launch is passed to `take` instead of being run.

    With `arch` (90 is 9.0) the launches are those for a GPU of that architecture. The tensors may then be on any
    device, even the meta device. This changes the whole process: do not use it while other threads launch kernels.
    """
    global _take, _arch
    before = _take, _arch
    _take, _arch = take, arch
    try:
        yield
    finally:
        _take, _arch = before


def architecture(device: torch.device) -> int | None:
    """Returns the compute capability (90 is 9.0) for which launches on `device` are compiled.

    Returns None if they are interpreted.
    """
    return _own(device) if _arch is None else _arch


@functools.cache
def _own(device: torch.device) -> int | None:
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
