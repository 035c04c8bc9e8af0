"""Eager PyTorch with and without masks, in NCT and in channels_last memory."""

import copy
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jasper_fast.nn.eager import MaskedConv1d

Model = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def eager(model: nn.Module) -> Model:
    """Returns `model` as it is: eager PyTorch as in NVIDIA's Jasper, with NCT memory, a module per step, and a mask
    before each encoder conv."""
    return model


def eager_no_masks(model: nn.Module) -> Model:
    """Returns eager PyTorch without masks, which is faster, but right only for batches without padding."""
    bare = copy.copy(model)
    encoder = dataclasses.replace(model.config.encoder, use_conv_masks=False)
    bare.config = dataclasses.replace(model.config, encoder=encoder)
    return bare


class ChannelsLast2d(nn.Module):
    """Eager PyTorch with each conv as a 2D conv over a height of 1, in channels_last memory.

    In that memory cuDNN needs no transposes. The weights are copies, whose names begin with "model.".
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for module in self.model.modules():  # changing the class keeps parameters, buffers and settings
            if isinstance(module, nn.BatchNorm1d):
                module.__class__ = nn.BatchNorm2d
            elif isinstance(module, nn.Conv1d):
                weight = module.weight.detach().unsqueeze(2).contiguous(memory_format=torch.channels_last)
                module.weight = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
                module.__class__ = _Conv2d
        self.model.decoder.layers[0].register_forward_hook(lambda conv, inputs, logits: logits.squeeze(2))

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (log_probs, lengths), as `EagerJasper` does."""
        return self.model(features.unsqueeze(2).contiguous(memory_format=torch.channels_last), lengths)


class _Conv2d(MaskedConv1d):
    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None:
            t = torch.arange(x.shape[-1], device=x.device)
            x = torch.where((t >= lengths[:, None])[:, None, None, :], 0.0, x)  # masked_fill loses channels_last memory
        geometry = (1, self.stride[0]), (0, self.padding[0]), (1, self.dilation[0])
        return F.conv2d(x, self.weight, self.bias, *geometry, self.groups)
