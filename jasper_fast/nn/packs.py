"""Packed weights that a module keeps between steps, so that no step allocates them or keeps them for its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.dispatch import backends


class Packs:
    """The weights of a module's convs as the kernels read them, Triton's and cuDNN's: one buffer a conv, filled anew in
    every forward, so that a weight is cast and turned once a step.

    They are copies, so they are in no state dict, and a module that is copied or pickled leaves them behind. A buffer
    follows the device of the weight and the dtype of the activations. Backward reads it too: its content changes only
    with the weight, whose version autograd checks.
    """

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def __call__(self, index: int, weight: Tensor, dtype: torch.dtype, face: str) -> Tensor | None:
        """`weight` (C_out, C_in, K), now, packed in `dtype` into the buffer of conv `index`.

        None where `face` packs for itself, and under torch.compile, which traces no buffer of ours.
        """
        if torch.compiler.is_compiling():
            return None
        impl = backends.face("conv1d", face)
        if not hasattr(impl, "packed_shape") or not getattr(impl, "packs", lambda *_: True)(weight, dtype):
            return None
        held, shape = self._held.get(index), impl.packed_shape(weight)
        if held is None or held.shape != shape or held.dtype != dtype or held.device != weight.device:
            held = self._held[index] = torch.empty(shape, dtype=dtype, device=weight.device)
        impl.pack(weight, dtype, out=held)
        return held

    def __reduce__(self) -> tuple[type[Packs], tuple[()]]:
        return Packs, ()
