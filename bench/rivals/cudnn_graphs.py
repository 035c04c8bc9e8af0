"""cuDNN's fused convolutions, called through its Python frontend: conv + statistics for training, and conv + bias +
ReLU for inference.

This rival uses cuDNN's fused engines in fp16 and NHWC only. A 1D conv is a 2D conv of height 1.
"""

import importlib.util

import torch
from torch import Tensor

from jasper_fast.bench.harness.errors import Absent


class FusedConv:
    """A cuDNN graph for a fused convolution of inputs that have the shape of `x` (N, C_in, T).

    `weight` is (C_out, C_in, K) in fp16. With `bias`, (C_out,) in fp32, the graph also adds the bias and applies ReLU.
    With `stats` it also computes the sums for batch norm. Raises Absent if the frontend or the GPU is missing, if
    `x` is not fp16 or C_out is not a multiple of 8, and if cuDNN has no engine for the pattern on this GPU.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        stride: int,
        padding: int,
        dilation: int,
        *,
        bias: Tensor | None = None,
        stats: bool = False,
    ) -> None:
        if not x.is_cuda:
            raise Absent("cuDNN needs an NVIDIA GPU")
        if x.dtype != torch.float16 or weight.shape[0] % 8:
            raise Absent("cuDNN's fused convolutions take only fp16, and a multiple of 8 output channels")
        if importlib.util.find_spec("cudnn") is None:
            raise Absent("cuDNN's frontend is not installed: pip install nvidia-cudnn-frontend")
        import cudnn

        (n, c_in, t), (c_out, _, k) = x.shape, weight.shape
        t_out = (t + 2 * padding - dilation * (k - 1) - 1) // stride + 1
        self.weight = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        self.y = torch.empty(n, t_out, c_out, dtype=x.dtype, device=x.device).transpose(1, 2)
        self.handle = cudnn.create_handle()
        half, single = cudnn.data_type.HALF, cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            io_data_type=half, intermediate_data_type=single, compute_data_type=single, handle=self.handle
        )
        self.x_at = graph.tensor(name="x", dim=[n, c_in, 1, t], stride=[t * c_in, 1, t * c_in, c_in], data_type=half)
        w_at = graph.tensor(
            name="w", dim=[c_out, c_in, 1, k], stride=[c_in * k, 1, c_in * k, c_in], data_type=half
        )  # fmt: skip
        y_at = graph.conv_fprop(
            image=self.x_at, weight=w_at, padding=[0, padding], stride=[1, stride], dilation=[1, dilation]
        )
        self.buffers = {w_at: self.weight}  # the caller may write other weights into it
        if bias is not None:
            b_at = graph.tensor(name="b", dim=[1, c_out, 1, 1], stride=[c_out, 1, c_out, c_out], data_type=single)
            y_at = graph.relu(graph.bias(input=y_at, bias=b_at))
            self.buffers[b_at] = bias
        if stats:
            self.sums = torch.empty(2, 1, c_out, 1, 1, device=x.device)
            for at, held in zip(graph.genstats(input=y_at), self.sums, strict=True):
                at.set_output(True).set_data_type(single)
                self.buffers[at] = held
        y_at.set_output(True).set_data_type(half).set_dim([n, c_out, 1, t_out])
        y_at.set_stride([t_out * c_out, 1, t_out * c_out, c_out])
        self.buffers[y_at] = self.y
        try:
            graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        except cudnn.cudnnGraphNotSupportedError as error:
            raise Absent(
                f"cuDNN {cudnn.backend_version_string()} has no engine for this convolution: {error}"
            ) from error
        self.graph = graph
        self.workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=x.device)
        self.set_stream = cudnn.set_stream

    def __call__(self, x: Tensor) -> Tensor:
        """Returns y (N, C_out, T') for `x` (N, C_in, T), both in NTC memory. The next call overwrites y."""
        self.set_stream(handle=self.handle, stream=torch.cuda.current_stream(x.device).cuda_stream)
        self.graph.execute({self.x_at: x, **self.buffers}, self.workspace, handle=self.handle)
        return self.y
