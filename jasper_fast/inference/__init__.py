"""Inference: batch norms are folded into the convs, and weights are packed once. With our kernels each sub-block is
one kernel (two if it is separable). The panes of a block (the 1x1 convs of its residual connections) read all their
block outputs from one buffer.

`engine` has the class for users. `plan` folds the model and decides which buffers each sub-block reads and writes.
`stepwise` runs the plan on ATen or the CPU kernels, and `launches` runs it on the Triton or CUDA kernels. On a GPU both
use CUDA graphs (`graphs`). `fuse` makes models of other projects run on our kernels: block by block in training
(`nn.fuse`), and as whole encoders in evaluation.
"""

from jasper_fast.inference.engine import InferenceEngine

__all__ = ["InferenceEngine"]
