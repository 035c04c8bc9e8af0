"""Jasper BxR with a CTC head. All activations, from the features to the log-probabilities, are in NTC memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jasper_fast import ops
from jasper_fast.dispatch import backends, tuned
from jasper_fast.kernels import tables
from jasper_fast.kernels.layout import mask, ntc
from jasper_fast.nn import architecture
from jasper_fast.nn.block import JasperBlock, count_batch, refuse_hooks
from jasper_fast.nn.cells import cells
from jasper_fast.nn.config import JasperConfig
from jasper_fast.ops import sync
from jasper_fast.ops.conv1d_op import autocast


class Jasper(nn.Module):
    """The Jasper acoustic model on fused sub-blocks, with NVIDIA's state-dict names.

    `forward(features (N, C, T) float, lengths (N,) frames) -> (log_probs (N, T', V) fp32, lengths (N,) of T' frames)`.
    Rows of `log_probs` at t >= length are meaningless. With conv masks (as in all files of configs/) the padding of
    `features` may have any values.

    `panes`: how training computes the batch statistics of the residual panes. "gram" takes them from the Gram matrices
    of the block outputs, without computing a pane's output. "plain" takes them from the output of each pane. "auto" is
    "gram" on a GPU and "plain" elsewhere. With `backend="auto"` it is also "plain" if the self-check of the Gram form
    did not pass.

    After `torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)`, training on several ranks takes batch statistics over
    all ranks (for torch.compile see `jasper_fast.ops.sync`).

    `backend`: "auto" takes the fastest face on the device of the input. "reference", "cpu", "triton" or "cuda" names a
    face; BackendMissing, which says how to get the face, is raised if it cannot run. `tune`: whether "auto" on a GPU
    measures times that no table has yet. The model does so in the first forward pass of each kind (training or
    evaluation, dtype and size), and keeps the results on disk (`jasper_fast.dispatch.tuned`). With `tune=False` it uses
    only existing tables and rules. The semantics are those of NVIDIA's `jasper/model.py`. Equivalent to
    `jasper_fast.nn.eager.EagerJasper(config)` with the same state dict.
    """

    def __init__(self, config: JasperConfig, backend: str = "auto", panes: str = "auto", tune: bool = True):
        super().__init__()
        self.config, self.backend, self.tune = config, backends.require(backend), tune
        self._met: set[tuple[torch.device, str, torch.dtype, int]] = set()  # kinds of calls that were measured
        architecture.add_layers(
            self, config, (JasperBlock(*shape, backend, panes) for shape in architecture.block_shapes(config))
        )
        self.pane_sources = architecture.pane_sources(config)
        self.encoder_frozen = False

    def freeze_encoder(self) -> None:
        """Makes the encoder a fixed function: it gets no gradients and stays in evaluation mode."""
        self.encoder_frozen = True
        self.encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Jasper:
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n, _, t = check_features(features, lengths, self.config)
        if self.backend == "auto" and features.is_cuda and not torch.compiler.is_compiling():
            if not self.tune:
                with tuned.off():
                    return self._forward(features, lengths)
            self._measured(features.device, n, t, features.dtype)
        return self._forward(features, lengths)

    def _measured(self, device: torch.device, n: int, t: int, dtype: torch.dtype) -> None:
        """Before the first forward pass of its kind, measures all faces among which the pass must choose. One process
        measures them all; measuring each op when it first runs would start one process per op."""
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype
        mode = "training" if self.training and torch.is_grad_enabled() else "evaluation"
        kind = device, mode, dtype, tables.bucket(n * t)
        if kind not in self._met:
            self._met.add(kind)
            tuned.want(device, cells(self.config, n, t, dtype, mode), "Jasper")

    def _forward(self, features: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        n, _, t = features.shape
        refuse_hooks(self.decoder.layers[0])
        masks = self.config.encoder.use_conv_masks
        if lengths is None:
            lengths = torch.full((n,), t, dtype=torch.int64, device=features.device)
        lengths = lengths.to(torch.int64)
        x = ntc(autocast(mask(features, lengths) if masks else features))  # masked_fill returns NCT memory
        sources, grams, lens = [x], {}, lengths
        for j, (layer, seed) in enumerate(zip(self.encoder.layers, self._seeds(x.device), strict=True)):
            b, x = layer.b, sources[-1]
            steps = [lens]
            for _ in range(b.repeat):
                steps.append(b.out_length(steps[-1]) if b.resizes else steps[-1])
            read = sources[len(sources) - len(self.pane_sources[j]) :]
            x = layer(x, read, self._grams(j, read, grams), steps if masks else None, seed)
            lens = steps[-1]
            sources = [*sources, x] if b.dense else [x]
        count_batch(m for m in self.encoder.modules() if isinstance(m, (nn.BatchNorm1d, nn.SyncBatchNorm)))
        head = self.decoder.layers[0]
        logits = F.linear(sources[-1].transpose(1, 2), head.weight.flatten(1), head.bias)
        return logits.float().log_softmax(dim=2), lens

    def _grams(self, j: int, sources: list[Tensor], known: dict) -> list[ops.Gram | None]:
        """Returns the Gram matrices that block `j` needs for its `sources`; None for a pane that needs none.

        `known` maps (block, pane) to the matrices made before. The first block that reads a source computes the
        statistics of all panes that will read it.
        """
        layers = self.encoder.layers
        for pane, x in enumerate(sources):
            if (j, pane) in known or not layers[j].reads_gram(pane, x):
                continue
            source = self.pane_sources[j][pane]
            reads = [(k, of.index(source)) for k, of in enumerate(self.pane_sources) if k >= j and source in of]
            later = [(k, q) for k, q in reads if layers[k].reads_gram(q, x)]
            gram = ops.gram(x, sync.group_of(layers[j].panes[pane][1]))
            weights = [layers[k].panes[q][0].weight for k, q in later]
            known.update(zip(later, ops.pane_stats(gram, weights), strict=True))
        return [known.get((j, pane)) for pane in range(len(sources))]

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Returns the lengths (N,) of the log-probabilities for features of `lengths` (N,), both in frames."""
        return architecture.out_lengths(self.config, lengths)

    def _seeds(self, device: torch.device) -> list[Tensor | None]:
        repeats = [layer.b.repeat for layer in self.encoder.layers]
        if not self.training or not any(layer.b.dropout for layer in self.encoder.layers):
            return [None] * len(repeats)
        return list(ops.draw_seeds(sum(repeats), device).split(repeats))  # one draw for the whole step


def check_features(features: Tensor, lengths: Tensor | None, config: JasperConfig) -> tuple[int, int, int]:
    """Returns (N, C, T) of `features`. Raises ValueError if they or `lengths` do not fit the model."""
    if features.dim() != 3 or features.shape[1] != config.encoder.in_feats:
        raise ValueError(f"features must be (N, {config.encoder.in_feats}, T), got {tuple(features.shape)}")
    if lengths is not None and (lengths.shape != features.shape[:1] or lengths.is_floating_point()):
        raise ValueError(f"lengths must be ({features.shape[0]},) integers, got {tuple(lengths.shape)} {lengths.dtype}")
    return features.shape
