"""What products of fp32 tensors are rounded to on a GPU: one switch for convs, panes and Gram, on every face.

It is PyTorch's own, so it governs plain PyTorch in the same process too. Left alone, PyTorch lets cuDNN's convs, and
with them this project's, round to TF32, and keeps matrix products as they are.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

FP32_PRECISIONS = ("ieee", "tf32")
_one_at_a_time = threading.RLock()  # the switch is the process's: those who set it for a while take turns


def set_fp32(precision: str | None) -> None:
    """Products of fp32 tensors keep fp32 ("ieee") or are rounded to TF32 ("tf32") from now on, convs and all others;
    None changes nothing. Raises ValueError for another name. CUDA graphs keep what held at their capture."""
    if check(precision) is None:
        return
    torch.backends.cudnn.conv.fp32_precision = precision
    torch.backends.cuda.matmul.fp32_precision = precision


def check(precision: str | None) -> str | None:
    """`precision` itself; raises ValueError naming the known ones."""
    if precision is not None and precision not in FP32_PRECISIONS:
        raise ValueError(f"fp32 precision {precision!r} is not one of {', '.join(FP32_PRECISIONS)}")
    return precision


@contextlib.contextmanager
def fp32(precision: str | None) -> Iterator[None]:
    """`set_fp32` inside, and afterwards what was before. Other threads that do so wait; what else they launch meanwhile
    follows it too."""
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    with contextlib.nullcontext() if precision is None else _one_at_a_time:
        before = [switch.fp32_precision for switch in switches]
        try:
            set_fp32(precision)
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.fp32_precision = value
