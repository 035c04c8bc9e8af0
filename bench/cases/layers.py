"""The distinct main convs of Jasper 10x5."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from jasper_fast.bench.cases import models
from jasper_fast.nn import cells


@dataclass(frozen=True)
class Layer:
    """A main conv of Jasper. With `head` it is the decoder's, which has a bias and no norm after it."""

    C_in: int
    C_out: int
    K: int
    stride: int = 1
    dilation: int = 1
    head: bool = False

    @property
    def padding(self) -> int:
        """Zeros on each side, as in NVIDIA's Jasper."""
        return self.K // 2 * self.dilation

    @property
    def first(self) -> bool:
        """Whether the input is the features, so that there is no norm before it and no gradient of the input."""
        return self.stride > 1

    def frames(self, T):
        """Returns the number of output frames for `T` input frames. `T` is a number or a tensor, and is returned itself
        if the conv keeps the number of frames."""
        if self.stride == 1 and self.K % 2:
            return T
        return (T + 2 * self.padding - self.dilation * (self.K - 1) - 1) // self.stride + 1

    def key(self, N: int, T: int) -> dict:
        """Returns the part of a result's key that names this layer, for N utterances of T input frames."""
        stride = f" s = {self.stride}" if self.stride > 1 else ""
        dilation = f" d = {self.dilation}" if self.dilation > 1 else ""
        return {"shape": f"({N}, {self.C_in}->{self.C_out}, {T})", "taps": f"K = {self.K}{stride}{dilation}"}


def layers() -> list[Layer]:
    """Returns the 13 distinct main convs of Jasper 10x5, largest first."""
    found = (Layer(*conv.shape, head=conv.place == "decoder") for conv in cells.convs(models.config("jasper10x5")))
    return sorted(dict.fromkeys(found), key=lambda a: -a.C_in * a.C_out * a.K)


def conv_2d(x: Tensor, weight: Tensor, a: Layer) -> Tensor:
    """Computes a conv as a 2D conv over a height of 1. If `x` and `weight` are in NTC memory, it runs in
    channels_last."""
    y = F.conv2d(x.unsqueeze(2), weight.unsqueeze(2), None, (1, a.stride), (0, a.padding), (1, a.dilation))
    return y.squeeze(2)
