"""Buffers of packed weights that a module keeps between steps, so that not every step allocates memory for them."""

from __future__ import annotations

import torch
from torch import Tensor

from jasper_fast.dispatch import backends


class Packs:
    """The weights of a module's convs in the memory order that the kernels read, in one buffer per conv.

    Every forward pass fills the buffers anew, so a weight is cast and rearranged once per step. The buffers are copies
    of the weights, so no state dict has them, and they are not copied or pickled with the module. A buffer has the
    device of the weight and the dtype of the activations. Backward also reads the buffer. This is safe, because the
    content changes only when the weight does, and autograd checks the version of the weight.
    """

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def __call__(self, index: int, weight: Tensor, dtype: torch.dtype, face: str) -> Tensor | None:
        """Returns the present `weight` (C_out, C_in, K), packed in `dtype` into the buffer of conv `index`.

        Returns None if `face` needs no packed copy of this weight, and under torch.compile, which cannot trace these
        buffers.
        """
        if torch.compiler.is_compiling():
            return None
        impl = backends.face("conv1d", face)
        if not hasattr(impl, "packed_shape") or not getattr(impl, "packs", lambda *_: True)(weight, dtype):
            return None
        held, shape = self._held.get(index), impl.packed_shape(weight)
        if held is None or held.shape != shape or held.dtype != dtype or held.device != weight.device:
            with torch.inference_mode(False):  # otherwise calls outside inference mode could not write to the buffer
                held = self._held[index] = torch.empty(shape, dtype=dtype, device=weight.device)
        impl.pack(weight, dtype, out=held)
        return held

    def tensors(self) -> list[Tensor]:
        """Returns the present buffers. A CUDA graph that fills and reads them must hold these references."""
        return list(self._held.values())

    def __reduce__(self) -> tuple[type[Packs], tuple[()]]:
        return Packs, ()
