"""Jasper BxR with a CTC head, in NTC memory from the features to the log-probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jasper_fast import ops
from jasper_fast.dispatch import backends
from jasper_fast.kernels.layout import mask, ntc
from jasper_fast.nn.architecture import block_shapes, init_weights
from jasper_fast.nn.architecture import out_lengths as _out_lengths
from jasper_fast.nn.block import JasperBlock, refuse_hooks
from jasper_fast.nn.config import JasperConfig
from jasper_fast.ops.conv1d_op import autocast


class Jasper(nn.Module):
    """The Jasper acoustic model on fused sub-blocks, with the reference's state-dict names.

    `forward(features (N, C, T) float, lengths (N,) frames) -> (log_probs (N, T', V) fp32, lengths (N,) of T' frames)`.
    Rows of `log_probs` at t >= length say nothing. With conv masks (the default configurations) whatever the padding of
    `features` holds changes nothing.

    `panes`: how training takes the batch statistics of the residual panes: "gram", from the Gram matrices of the block
    outputs (no pane output is made for it), or "plain", pane by pane; "auto" is "gram" on a GPU, "plain" elsewhere.

    After `torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)` training on several ranks takes batch statistics over
    all of them (`jasper_fast.ops.sync` says what torch.compile needs then).

    `backend`: "auto" takes the fastest face on the device of the input; "reference", "cpu", "triton" or "cuda" ask for
    one, and raise BackendMissing, saying how to get it, where it cannot run. Source of the semantics: the reference's
    `jasper/model.py`; equivalent to `jasper_fast.nn.eager.EagerJasper(config)` with the same state dict.
    """

    def __init__(self, config: JasperConfig, backend: str = "auto", panes: str = "auto"):
        super().__init__()
        self.config, self.backend = config, backends.require(backend)
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.layers = nn.ModuleList(JasperBlock(c, b, p, backend, panes) for c, b, p in block_shapes(config))
        self.decoder.layers = nn.ModuleList([nn.Conv1d(config.decoder.in_feats, config.decoder.n_classes, 1)])
        init_weights(self, config)
        self.encoder_frozen = False

    def freeze_encoder(self) -> None:
        """Makes the encoder a fixed function: no gradients, and evaluation mode (statistics, no dropout) for good."""
        self.encoder_frozen = True
        self.encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Jasper:
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n, _, t = check_features(features, lengths, self.config)
        if n == 0 and self.encoder.training:
            raise ValueError("an empty batch (N = 0) has no statistics to train with: leave it out")
        refuse_hooks(self.decoder.layers[0])
        masks = self.config.encoder.use_conv_masks
        if lengths is None:
            lengths = torch.full((n,), t, dtype=torch.int64, device=features.device)
        lengths = lengths.to(torch.int64)
        x = ntc(autocast(mask(features, lengths) if masks else features))  # masked_fill leaves NCT memory
        seeds = self._seeds(x.device)
        sources, grams, lens = [x], [None], lengths
        for layer, seed in zip(self.encoder.layers, seeds, strict=True):
            b, x = layer.b, sources[-1]
            steps = [lens]
            for _ in range(b.repeat):
                same = b.s == 1 and 2 * b.padding == b.d * (b.k - 1)  # saves some tiny kernels
                steps.append(steps[-1] if same else b.out_length(steps[-1]))
            taken = (sources if b.residual_dense else sources[-1:]) if b.residual else []
            first = len(sources) - len(taken)
            for pane in range(len(taken)):
                grams[first + pane] = grams[first + pane] or layer.gram(pane, sources[first + pane])
            x = layer(x, taken, grams[first:], steps if masks else None, seed)
            lens = steps[-1]
            if b.residual and b.residual_dense:
                sources, grams = [*sources, x], [*grams, None]
            else:
                sources, grams = [x], [None]
        self._count_batch()
        head = self.decoder.layers[0]
        logits = F.linear(sources[-1].transpose(1, 2), head.weight.flatten(1), head.bias)
        return logits.float().log_softmax(dim=2), lens

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Frames of the log-probabilities for `lengths` (N,) frames of features."""
        return _out_lengths(self.config, lengths)

    def _seeds(self, device: torch.device) -> list[Tensor | None]:
        repeats = [layer.b.repeat for layer in self.encoder.layers]
        if not self.training or not any(layer.b.dropout for layer in self.encoder.layers):
            return [None] * len(repeats)
        return list(ops.draw_seeds(sum(repeats), device).split(repeats))  # one draw for the whole step

    def _count_batch(self) -> None:
        counters = [
            m.num_batches_tracked
            for m in self.encoder.modules()
            if isinstance(m, (nn.BatchNorm1d, nn.SyncBatchNorm)) and m.training and m.num_batches_tracked is not None
        ]
        if counters:
            torch._foreach_add_(counters, 1)


def check_features(features: Tensor, lengths: Tensor | None, config: JasperConfig) -> tuple[int, int, int]:
    """(N, C, T) of `features`; raises ValueError where they or `lengths` do not fit the model."""
    if features.dim() != 3 or features.shape[1] != config.encoder.in_feats:
        raise ValueError(f"features must be (N, {config.encoder.in_feats}, T), got {tuple(features.shape)}")
    if lengths is not None and (lengths.shape != features.shape[:1] or lengths.is_floating_point()):
        raise ValueError(f"lengths must be ({features.shape[0]},) integers, got {tuple(lengths.shape)} {lengths.dtype}")
    return features.shape
