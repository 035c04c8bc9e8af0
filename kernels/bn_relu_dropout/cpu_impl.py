"""The CPU face of bn_relu_dropout: threaded C++ kernels (csrc/cpu) that pick their vector instructions at run time.

Results are bit-identical for any number of threads.
"""

from jasper_fast.kernels import native
from jasper_fast.kernels.bn_relu_dropout.native_face import NativeFace

_face = NativeFace(native.cpu)
stats, forward = _face.stats, _face.forward
backward_reduce, backward_apply = _face.backward_reduce, _face.backward_apply
