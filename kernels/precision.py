"""Sets the precision of products of fp32 tensors on a GPU: one switch for the convs and matrix products of all faces.

It sets PyTorch's own switches, so it also changes plain PyTorch in the same process. By PyTorch's defaults
convs may round to TF32, also those of this project, and matrix products keep full fp32.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch

FP32_PRECISIONS = ("ieee", "tf32")
_one_at_a_time = threading.RLock()  # the switch belongs to the whole process, so contexts of several threads take turns


def set_fp32(precision: str | None) -> None:
    """Sets whether convs and matmuls of fp32 tensors keep fp32 ("ieee") or round their operands to TF32 ("tf32").

    None changes nothing. CUDA graphs keep the setting of their capture. Raises ValueError for another name.
    """
    if check(precision) is None:
        return
    torch.backends.cudnn.conv.fp32_precision = precision
    torch.backends.cuda.matmul.fp32_precision = precision


def check(precision: str | None) -> str | None:
    """Returns `precision`. Raises ValueError, which lists the valid names, if it is none of them and not None."""
    if precision is not None and precision not in FP32_PRECISIONS:
        raise ValueError(f"fp32 precision {precision!r} is not one of {', '.join(FP32_PRECISIONS)}")
    return precision


@contextlib.contextmanager
def fp32(precision: str | None) -> Iterator[None]:
    """A context with the setting of `set_fp32(precision)`. At its end the earlier setting is restored.

    Contexts of several threads take turns: one waits until the other ends. Launches of threads that are in no context
    use the setting as well. With None the context does nothing.
    """
    if precision is None:
        yield
        return
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    with _one_at_a_time:
        before = [switch.fp32_precision for switch in switches]
        try:
            set_fp32(precision)
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value
