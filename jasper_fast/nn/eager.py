"""Jasper in eager PyTorch, computed as in NVIDIA's Jasper, with the same parameters and state-dict names.

It works in NCT memory with one module per step: masked_fill, Conv1d, BatchNorm1d, ReLU, Dropout. It defines the results
that the fused model must return, and benchmarks compare with it.
"""

from torch import Tensor, nn

from jasper_fast.kernels.layout import mask
from jasper_fast.nn.architecture import add_layers, block_shapes, convs_and_norm, frames, out_lengths
from jasper_fast.nn.config import BlockConfig, JasperConfig


class MaskedConv1d(nn.Conv1d):
    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        return super().forward(mask(x, lengths))


class EagerBlock(nn.Module):
    """R sub-blocks with their residual panes. `forward` takes `xs`, the list of block outputs that the block may read,
    its input last, and their lengths. It returns both for the next block."""

    def __init__(self, c_in: int, b: BlockConfig, panes: list[int]):
        super().__init__()
        self.cfg = b
        self.conv = nn.ModuleList()
        for i in range(b.repeat):
            self.conv += convs_and_norm(c_in if i == 0 else b.filters, b.filters, b, MaskedConv1d)
            if i < b.repeat - 1:
                self.conv += [nn.ReLU(inplace=True), nn.Dropout(b.dropout)]
        if panes:
            self.res = nn.ModuleList(nn.ModuleList(convs_and_norm(c, b.filters, None, MaskedConv1d)) for c in panes)
        self.out = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(b.dropout))

    def forward(self, xs: list[Tensor], lengths: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        x, lens = xs[-1], lengths
        for layer in self.conv:
            if isinstance(layer, nn.Conv1d):
                x, lens = layer(x, lens), frames(layer, lens)
            else:
                x = layer(x)
        panes = xs if self.cfg.residual_dense else xs[-1:]
        for (conv, bn), pane in zip(getattr(self, "res", ()), panes, strict=False):
            x = x + bn(conv(pane, lengths))
        x = self.out(x)
        return ([*xs, x] if self.cfg.dense else [x]), lens


class EagerJasper(nn.Module):
    """`forward(features (N, C, T), lengths (N,)) -> (log_probs (N, T', V) fp32, lengths (N,))` in eager PyTorch."""

    def __init__(self, config: JasperConfig):
        super().__init__()
        self.config = config
        add_layers(self, config, (EagerBlock(*shape) for shape in block_shapes(config)))

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        xs, lens = [features], lengths if self.config.encoder.use_conv_masks else None
        for layer in self.encoder.layers:
            xs, lens = layer(xs, lens)
        log_probs = self.decoder.layers[0](xs[-1]).transpose(1, 2).float().log_softmax(dim=2)
        return log_probs, out_lengths(self.config, lengths)
