"""The CUDA face of bn_relu_dropout: C++ kernels (csrc/cuda) for sm_75 and later, on the current stream of y's device.

Reductions merge partial results in a fixed order, so runs on one GPU are bit-identical.
"""

import functools
from typing import Any

from jasper_fast.kernels import native, nvrtc
from jasper_fast.kernels.bn_relu_dropout import cuda_nvrtc
from jasper_fast.kernels.bn_relu_dropout.native_face import NativeFace


@functools.cache
def _ops() -> Any:
    return nvrtc.either(native.cuda, cuda_nvrtc.Compiled)


_face = NativeFace(_ops)
stats, forward = _face.stats, _face.forward
backward_reduce, backward_apply = _face.backward_reduce, _face.backward_apply
