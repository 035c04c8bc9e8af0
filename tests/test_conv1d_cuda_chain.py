"""Launches that may begin while the previous launch still runs touch only weights before they wait for its end.

The emulation begins such a launch with NaN in all memory that the previous launch may read or write. It restores the
memory only when no thread can go on before it has waited (csrc/cuda/emulate/grids.cpp).
"""

import ctypes

import conv_cases
import cuda_host
import pytest
import torch
from standins import CPU
from test_conv1d_cuda import Face, face, functions, poisoned  # noqa: F401 (fixtures)
from torch import Tensor

from jasper_fast.kernels.conv1d import cuda_impl
from jasper_fast.kernels.conv1d.gpu_shared import Chain
from jasper_fast.kernels.operands import Lengths

LAYERS = {
    # layer, channels of the panes, whether several CTAs share a tile
    "a tile in the padding": ((2, 72, 40, 150, 3, 1, 1, [150, 30]), 0, False),
    "panes": ((2, 136, 72, 75, 5, 1, 1, [75, 20]), 88, False),
    "shared": ((1, 264, 72, 75, 5, 1, 2, [61]), 88, True),
    "shared, in the padding": ((2, 264, 40, 140, 3, 1, 1, [140, 0]), 0, True),
    "strided": ((2, 64, 32, 45, 11, 2, 1, [45, 20]), 0, False),
}


def emulation() -> ctypes.CDLL:
    """Returns the same library that the `functions` fixture loads."""
    library = ctypes.CDLL(str(cuda_host.build([cuda_host.CSRC / "cuda/emulate/conv1d.cpp"])))
    library.jf_emulation_count.restype = ctypes.c_int64
    return library


def depends(library: ctypes.CDLL, *tensors: Tensor) -> None:
    """Adds the memory of `tensors` to what an early launch must not touch before its wait.

    Called without tensors, it clears that list.
    """
    for x in tensors:
        storage = x.untyped_storage()
        library.jf_emulation_depends(ctypes.c_void_p(storage.data_ptr()), ctypes.c_int64(storage.nbytes()))
    if not tensors:
        library.jf_emulation_depends(None, ctypes.c_int64(0))


def check_early(library: ctypes.CDLL, layer: conv_cases.Layer, c2: int, shared: bool, dtype: torch.dtype) -> None:
    """Checks that an early launch of `fused` gives the same bits as one that begins when all others have ended."""
    x, weight, geometry, lengths = conv_cases.make(layer, dtype, CPU)
    n, c_out, k = x.shape[0], weight.shape[0], weight.shape[2]
    rows, bias = poisoned(x, lengths).transpose(1, 2), torch.randn(c_out)
    t_out = geometry.frames(x.shape[2], k)
    packed, space = cuda_impl.pack_once(weight, dtype), cuda_impl.Workspace("cpu") if shared else None
    panes = (torch.randn(n, t_out, c2).to(dtype), cuda_impl.pack_once(torch.randn(c_out, c2, 1), dtype)) if c2 else None
    if shared:
        space.reserve(1 << 20, 64)
    made, out = torch.empty_like(lengths), torch.zeros(n, t_out, c_out, dtype=dtype)

    def run(chain: Chain) -> tuple[Tensor, Tensor]:
        cuda_impl.fused(
            rows, packed, geometry, lengths=Lengths(lengths, None, made), bias=bias, relu=True, panes=panes, out=out,
            workspace=space, chain=chain,
        )  # fmt: skip
        return out.clone(), made.clone()

    want = run(Chain())
    try:
        scratch = (space.part, space.arrived) if shared else ()
        depends(library, rows, lengths, made, out, *scratch, *(panes or ())[:1])
        got = run(Chain(True, (packed.data, packed.data)))
    finally:
        depends(library)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("loop", [80, 90])
@pytest.mark.parametrize("name", LAYERS)
def test_an_early_launch_touches_weights_alone_before_it_waits(face: Face, name: str, loop: int) -> None:  # noqa: F811
    layer, c2, shared = LAYERS[name]
    face.on(loop, 64 if shared else 2)
    library = emulation()
    check_early(library, layer, c2, shared, torch.float16)
    packed = torch.empty(cuda_impl.packed_shape(torch.empty(layer[2], layer[1], layer[4]))[:3])
    assert library.jf_emulation_count(b"prefetch_bulk") == 2 * packed.numel(), "an image was not fetched exactly once"
