"""Eager PyTorch with and without masks, in NCT and in channels_last memory."""

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Model = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def eager(model: nn.Module) -> Model:
    """Returns eager PyTorch as in NVIDIA's Jasper: NCT memory, one module per step, a mask before every convolution."""
    return model


def eager_no_masks(model: nn.Module) -> Model:
    """Returns the same without masks, which is faster, but right only for batches without padding."""
    bare = copy.copy(model)
    bare.config = _without_masks(model.config)
    return bare


class ChannelsLast2d(nn.Module):
    """Eager PyTorch with each conv as a 2D conv over a height of 1, in channels_last memory.

    In that memory cuDNN needs no transposes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.weights = nn.ParameterDict()
        for name, conv in _convs(model):
            weight = conv.weight.detach().unsqueeze(2).to(memory_format=torch.channels_last)
            self.weights[name.replace(".", "/")] = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (log_probs, lengths), as `EagerJasper` does."""
        masks = self.model.config.encoder.use_conv_masks
        xs = [features.unsqueeze(2).contiguous(memory_format=torch.channels_last)]
        lens = lengths if masks else None
        for b, block in enumerate(self.model.encoder.layers):
            xs, lens = self._block(f"encoder/layers/{b}", block, xs, lens)
        decoder = self.model.decoder.layers[0]
        logits = F.conv2d(xs[-1], self.weights["decoder/layers/0"], decoder.bias).squeeze(2)
        out_lengths = lengths
        for block in self.model.encoder.layers:
            for _ in range(block.cfg.repeat):
                out_lengths = block.cfg.out_length(out_lengths)
        return logits.transpose(1, 2).float().log_softmax(dim=2), out_lengths

    def _block(
        self, at: str, block: nn.Module, xs: list[Tensor], lens: Tensor | None
    ) -> tuple[list[Tensor], Tensor | None]:
        x, lens_in = xs[-1], lens
        for i, layer in enumerate(block.conv):
            if isinstance(layer, nn.Conv1d):
                x = self._conv(f"{at}/conv/{i}", layer, x, lens)
                lens = layer.out_length(lens) if lens is not None else None
            else:
                x = _norm2d(layer, x) if isinstance(layer, nn.BatchNorm1d) else layer(x)
        panes = xs if block.cfg.residual_dense else xs[-1:]
        for k, ((conv, norm), pane) in enumerate(zip(getattr(block, "res", ()), panes, strict=False)):
            x = x + _norm2d(norm, self._conv(f"{at}/res/{k}/0", conv, pane, lens_in))
        x = block.out(x)
        return ([*xs, x] if block.cfg.residual and block.cfg.residual_dense else [x]), lens

    def _conv(self, name: str, conv: nn.Conv1d, x: Tensor, lens: Tensor | None) -> Tensor:
        if lens is not None:
            t = torch.arange(x.shape[-1], device=x.device)
            x = torch.where((t >= lens[:, None])[:, None, None, :], 0.0, x)  # masked_fill loses channels_last memory
        how = (1, conv.stride[0]), (0, conv.padding[0]), (1, conv.dilation[0]), conv.groups
        return F.conv2d(x, self.weights[name], None, *how)


def _norm2d(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    if norm.training:
        norm.num_batches_tracked.add_(1)
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
    )


def _without_masks(config):
    import dataclasses

    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, use_conv_masks=False))


def _convs(model: nn.Module) -> Iterator[tuple[str, nn.Conv1d]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv1d))
