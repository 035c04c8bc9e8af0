"""Helpers for the tests of the inference engine: small models, a stand-in for CUDA graphs, poisoned buffers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from jasper_fast import InferenceEngine, Jasper, JasperConfig
from jasper_fast.nn.eager import EagerJasper

FEATS = 8


def block(filters, repeat=1, k=5, s=1, d=1, dropout=0.0, residual=False, dense=False):
    return {
        "filters": filters, "repeat": repeat, "kernel_size": [k], "stride": [s], "dilation": [d], "dropout": dropout,
        "residual": residual, "residual_dense": dense,
    }  # fmt: skip


BLOCKS = {
    # like Jasper 10x5: a prologue of stride 2, dense blocks, an epilogue with dilation, a pointwise conv
    "jasper": [
        block(16, k=11, s=2),
        block(16, 2, 5, residual=True, dense=True),
        block(24, 2, 7, residual=True, dense=True),
        block(16, k=9, d=2),
        block(16, k=1),
    ],
    "plain residual": [block(16, k=5), block(16, 2, 3, residual=True), block(16, k=1)],
    "dense first": [block(16, 2, 5, residual=True, dense=True), block(16, 1, 3, residual=True, dense=True)],
    "dense first, one conv": [block(16, 1, 5, residual=True, dense=True)],
    "lengths change twice": [block(16, k=5, s=2), block(16, k=4), block(16, k=3, s=2), block(16, k=3)],
    "one conv": [block(16, k=3)],
}


def config(kind: str | list[dict] = "jasper", masks=True, classes=7, feats=FEATS):
    """Returns the configuration of a small model. `kind`: its blocks, or their name in BLOCKS."""
    blocks = BLOCKS[kind] if isinstance(kind, str) else kind
    encoder = {"in_feats": feats, "activation": "relu", "use_conv_masks": masks, "blocks": blocks}
    return JasperConfig.from_dict(
        {"encoder": encoder, "decoder": {"in_feats": blocks[-1]["filters"], "n_classes": classes}}
    )


def draw_statistics(model: nn.Module) -> nn.Module:
    """Gives every batch norm random running statistics; returns the model."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


def pair(cfg, backend="auto", device="cpu", panes="auto") -> tuple[EagerJasper, Jasper]:
    """Returns (eager, ours) in evaluation mode, with the same parameters and random running statistics."""
    eager = draw_statistics(EagerJasper(cfg))
    ours = Jasper(cfg, backend=backend, panes=panes)
    ours.load_state_dict(eager.state_dict())
    return eager.to(device).eval(), ours.to(device).eval()


def batch(lengths, t=None, feats=FEATS, device="cpu", scale=1.0) -> tuple[Tensor, Tensor]:
    """Returns features whose padding holds NaN, and their lengths."""
    t = max(lengths) if t is None else t
    lengths = torch.tensor(lengths, device=device)
    features = scale * torch.randn(len(lengths), feats, t, device=device)
    beyond = torch.arange(t, device=device) >= lengths[:, None]
    return features.masked_fill(beyond[:, None], float("nan")), lengths


def valid(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Returns the rows of `log_probs` that lie within the lengths."""
    return log_probs[torch.arange(log_probs.shape[1], device=lengths.device) < lengths[:, None]]


def poison(engine: InferenceEngine) -> None:
    """Fills the engine's buffers: those of activations with NaN, those of lengths with the largest integer."""
    for held in (engine._run.buffers, engine._run.lengths):
        for buffer in held.held.values():
            buffer.fill_(float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).max)


class Replays:
    """Stands in for CudaGraphs where there is no GPU: a replay runs the captured launches again, on the same memory."""

    def __init__(self, device: torch.device):
        """Takes the argument of CudaGraphs, which is not needed here."""

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        launch()
        return launch
