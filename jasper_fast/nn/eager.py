"""Jasper in eager PyTorch, computed as in the reference, with the same parameters and state-dict names.

It works in NCT memory with one module per step: masked_fill, Conv1d, BatchNorm1d, ReLU, Dropout. It defines the results
that the fused model must return, and every benchmark compares with it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jasper_fast.nn.architecture import BN_EPS, BN_MOMENTUM, block_shapes, init_weights, out_lengths
from jasper_fast.nn.config import BlockConfig, JasperConfig


class _MaskedConv1d(nn.Conv1d):
    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is not None:
            t = torch.arange(x.shape[-1], device=x.device)
            x = x.masked_fill((t >= lengths[:, None]).unsqueeze(1), 0)
        return super().forward(x)

    def out_length(self, lengths: Tensor) -> Tensor:
        (k,), (s,), (p,), (d,) = self.kernel_size, self.stride, self.padding, self.dilation
        return (lengths + 2 * p - d * (k - 1) - 1) // s + 1


def _conv_bn(c_in: int, c_out: int, b: BlockConfig | None) -> list[nn.Module]:
    geometry = (b.k, b.s, b.padding, b.d) if b else (1,)
    convs = [_MaskedConv1d(c_in, c_out, *geometry, bias=False)]
    if b and b.separable:
        convs = [_MaskedConv1d(c_in, c_in, *geometry, groups=c_in, bias=False)]
        convs.append(_MaskedConv1d(c_in, c_out, 1, bias=False))
    return [*convs, nn.BatchNorm1d(c_out, BN_EPS, BN_MOMENTUM)]


class EagerBlock(nn.Module):
    """R sub-blocks with their residual panes. `xs` is the list of block outputs so far."""

    def __init__(self, c_in: int, b: BlockConfig, panes: list[int]):
        super().__init__()
        self.cfg = b
        self.conv = nn.ModuleList()
        for i in range(b.repeat):
            self.conv += _conv_bn(c_in if i == 0 else b.filters, b.filters, b)
            if i < b.repeat - 1:
                self.conv += [nn.ReLU(inplace=True), nn.Dropout(b.dropout)]
        if panes:
            self.res = nn.ModuleList(nn.ModuleList(_conv_bn(c, b.filters, None)) for c in panes)
        self.out = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(b.dropout))

    def forward(self, xs: list[Tensor], lengths: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        x, lens = xs[-1], lengths
        for layer in self.conv:
            if isinstance(layer, nn.Conv1d):
                x = layer(x, lens)
                lens = layer.out_length(lens) if lens is not None else None
            else:
                x = layer(x)
        panes = xs if self.cfg.residual_dense else xs[-1:]
        for (conv, bn), pane in zip(getattr(self, "res", ()), panes, strict=False):
            x = x + bn(conv(pane, lengths))
        x = self.out(x)
        dense = self.cfg.residual and self.cfg.residual_dense
        return ([*xs, x] if dense else [x]), lens


class EagerJasper(nn.Module):
    """`forward(features (N, C, T), lengths (N,)) -> (log_probs (N, T', V) fp32, lengths (N,))` in eager PyTorch."""

    def __init__(self, config: JasperConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = nn.Module(), nn.Module()
        layers = [EagerBlock(c_in, b, panes) for c_in, b, panes in block_shapes(config)]
        self.encoder.layers = nn.ModuleList(layers)
        self.decoder.layers = nn.ModuleList([nn.Conv1d(config.decoder.in_feats, config.decoder.n_classes, 1)])
        init_weights(self, config)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        masks = self.config.encoder.use_conv_masks
        xs, lens = [features], lengths if masks else None
        for layer in self.encoder.layers:
            xs, lens = layer(xs, lens)
        log_probs = self.decoder.layers[0](xs[-1]).transpose(1, 2).float().log_softmax(dim=2)
        return log_probs, out_lengths(self.config, lengths)
