"""What the fused and the eager Jasper share: block shapes, output lengths and initial weights."""

from __future__ import annotations

from torch import Tensor, nn

from jasper_fast.nn.config import BlockConfig, JasperConfig

BN_EPS, BN_MOMENTUM = 1e-3, 0.1


def block_shapes(config: JasperConfig) -> list[tuple[int, BlockConfig, list[int]]]:
    """Returns (input channels, block, channels of each pane) for every block. With dense residuals, a block has a pane
    for every earlier block output."""
    shapes, c_in, dense = [], config.encoder.in_feats, []
    for b in config.encoder.blocks:
        if b.residual and b.residual_dense:
            dense = dense or [c_in]
            shapes.append((c_in, b, list(dense)))
            dense.append(b.filters)
        else:
            shapes.append((c_in, b, [c_in] if b.residual else []))
            dense = []
        c_in = b.filters
    return shapes


def pane_readers(config: JasperConfig) -> dict[int, list[tuple[int, int]]]:
    """Returns the panes, as (block, pane), that read each source. Source 0 is the features, and j + 1 the output of
    block j."""
    found: dict[int, list[tuple[int, int]]] = {0: []}
    sources = [0]
    for j, b in enumerate(config.encoder.blocks):
        for pane, source in enumerate((sources if b.residual_dense else sources[-1:]) if b.residual else []):
            found[source].append((j, pane))
        found[j + 1] = []
        sources = [*sources, j + 1] if b.residual and b.residual_dense else [j + 1]
    return found


def out_lengths(config: JasperConfig, lengths: Tensor) -> Tensor:
    """Returns the frames of the log-probabilities for `lengths` (N,) frames of features."""
    for b in config.encoder.blocks:
        for _ in range(b.repeat):
            lengths = b.out_length(lengths)
    return lengths


def init_weights(model: nn.Module, config: JasperConfig) -> None:
    """Initialises weights as the reference does: convs by `init` (gain 1), batch norm's gamma to 1 and beta to 0."""
    for part, init in ((model.encoder, config.encoder.init), (model.decoder, config.decoder.init)):
        for module in part.modules():
            if isinstance(module, nn.Conv1d):
                getattr(nn.init, f"{init}_")(module.weight)
