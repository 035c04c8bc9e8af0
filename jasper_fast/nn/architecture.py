"""What the fused and the eager Jasper share: block shapes, modules, output lengths and initial weights."""

from collections.abc import Iterable

from torch import Tensor, nn

from jasper_fast.kernels.operands import Geometry
from jasper_fast.nn.config import BlockConfig, JasperConfig

BN_EPS, BN_MOMENTUM = 1e-3, 0.1


def pane_sources(config: JasperConfig) -> list[list[int]]:
    """Returns the sources that the panes (1x1 residual convs) of each block read. Source 0 is the features, and source
    j + 1 the output of block j. A block with a residual has a pane for its own input. If the residual is dense, it also
    has a pane for the input of each of the consecutive dense blocks before it."""
    found, sources = [], [0]
    for j, b in enumerate(config.encoder.blocks):
        found.append((sources if b.residual_dense else sources[-1:]) if b.residual else [])
        sources = [*sources, j + 1] if b.dense else [j + 1]
    return found


def block_shapes(config: JasperConfig) -> list[tuple[int, BlockConfig, list[int]]]:
    """Returns (input channels, block, input channels of each pane) for every block."""
    blocks = config.encoder.blocks
    channels = [config.encoder.in_feats, *(b.filters for b in blocks)]
    panes = [[channels[source] for source in sources] for sources in pane_sources(config)]
    return list(zip(channels, blocks, panes, strict=False))


def frames(conv: nn.Conv1d, lengths: Tensor | int | None) -> Tensor | int | None:
    """Returns the number of output frames of `conv` for inputs of `lengths` frames: `lengths` itself if the conv does
    not change it."""
    (k,), (s,), (d,), (p,) = conv.kernel_size, conv.stride, conv.dilation, conv.padding
    if lengths is None or (s == 1 and 2 * p == d * (k - 1)):
        return lengths
    return Geometry(s, p, d).frames(lengths, k)


def out_lengths(config: JasperConfig, lengths: Tensor) -> Tensor:
    """Returns the lengths (N,) of the log-probabilities for features of `lengths` (N,), both in frames."""
    for b in config.encoder.blocks:
        for _ in range(b.repeat):
            lengths = b.out_length(lengths)
    return lengths


def convs_and_norm(c_in: int, c_out: int, b: BlockConfig | None, conv: type[nn.Conv1d]) -> list[nn.Module]:
    """Makes the convs (of class `conv`) and the batch norm of a sub-block of `b`, or of a pane if `b` is None."""
    geometry = (b.k, b.s, b.padding, b.d) if b else (1,)
    convs = [conv(c_in, c_out, *geometry, bias=False)]
    if b and b.separable:
        convs = [conv(c_in, c_in, *geometry, groups=c_in, bias=False), conv(c_in, c_out, 1, bias=False)]
    return [*convs, nn.BatchNorm1d(c_out, BN_EPS, BN_MOMENTUM)]


def add_layers(model: nn.Module, config: JasperConfig, blocks: Iterable[nn.Module]) -> None:
    """Adds encoder and decoder under the names of NVIDIA's Jasper, and initialises their weights as NVIDIA does: convs
    by `init` of the configuration, batch norm's gamma to 1 and beta to 0."""
    model.encoder, model.decoder = nn.Module(), nn.Module()
    model.encoder.layers = nn.ModuleList(blocks)
    model.decoder.layers = nn.ModuleList([nn.Conv1d(config.decoder.in_feats, config.decoder.n_classes, 1)])
    for part, init in ((model.encoder, config.encoder.init), (model.decoder, config.decoder.init)):
        for module in part.modules():
            if isinstance(module, nn.Conv1d):
                getattr(nn.init, f"{init}_")(module.weight)
