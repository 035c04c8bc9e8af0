"""The networks, weights and inputs that the model benchmarks share."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jasper_fast import Jasper, JasperConfig
from jasper_fast.bench.cases import counts
from jasper_fast.bench.harness.seeds import seeded, stable_seed
from jasper_fast.kernels.layout import mask
from jasper_fast.nn.block import JasperBlock
from jasper_fast.nn.eager import EagerJasper

FRAMES = {2.0: 208, 7.0: 704, 16.7: 1680}  # feature frames by seconds of audio, with the padding of NVIDIA's Jasper
VOCABULARY = 29


def _blocks(prologue: int, widths: tuple[tuple[int, int, float], ...], repeat: int, last: int) -> list[dict]:
    """Returns the blocks of a dense-residual Jasper: a first block with stride 2, one block for each (channels, taps,
    dropout) in `widths`, and a last block with 1 tap."""

    def block(filters: int, K: int, p: float, **more) -> dict:
        return {"filters": filters, "kernel_size": [K], "stride": [1], "dilation": [1], "dropout": p, **more}

    first = block(prologue, 11, 0.2, repeat=1, residual=False) | {"stride": [2]}
    dense = [block(w, K, p, repeat=repeat, residual=True, residual_dense=True) for w, K, p in widths]
    return [first, *dense, block(last, 1, 0.4, repeat=1, residual=False)]


QUARTZNET = [
    block | {"separable": True, "dropout": 0.0, "residual_dense": False}
    for block in _blocks(128, ((128, 33, 0.0), (128, 39, 0.0), (256, 51, 0.0)), 3, 256)
]
QUARTZNET[-1]["separable"] = False
SMALLER = {
    "small": _blocks(128, ((128, 11, 0.2), (192, 13, 0.2), (256, 17, 0.2)), 3, 256),
    "medium": _blocks(256, ((256, 11, 0.2), (384, 13, 0.2), (512, 17, 0.2)), 3, 512),
    "quartznet_small": QUARTZNET,
}


def config(name: str) -> JasperConfig:
    """Returns the configuration of a model.

    `name` is "small" (128 to 256 channels), "medium" (256 to 512), "jasper10x5", "quartznet_small" (128 to 256),
    "quartznet15x5", or the path of a YAML file.
    """
    if name in SMALLER:
        blocks = SMALLER[name]
        encoder = {"in_feats": 64, "activation": "relu", "use_conv_masks": True, "blocks": copy.deepcopy(blocks)}
        return JasperConfig.from_dict(
            {"encoder": encoder, "decoder": {"in_feats": blocks[-1]["filters"], "n_classes": VOCABULARY}}
        )
    published = {"jasper10x5": "jasper10x5dr.yaml", "quartznet15x5": "quartznet15x5.yaml"}
    return JasperConfig.from_yaml(files("jasper_fast.configs") / published[name] if name in published else name)


def needs(cfg: JasperConfig, ops: tuple[str, ...]) -> tuple[str, ...]:
    """Returns `ops`, and the depthwise op if the network has separable blocks, by their names in the self-check."""
    return (*ops, "depthwise") if any(block.separable for block in cfg.encoder.blocks) else ops


LARGE = 50e6  # a network with at least this many parameters takes long to compute in fp64


def exact(cfg: JasperConfig, device: torch.device) -> torch.dtype:
    """Returns the precision of the answers with which contenders are compared: fp64, but fp32 for a large network on a
    CPU."""
    return torch.float64 if counts.parameters(cfg) < LARGE or device.type == "cuda" else torch.float32


_made: dict[tuple, dict[str, Tensor]] = {}


def weights(cfg: JasperConfig, device: torch.device, frames: int = 208) -> dict[str, Tensor]:
    """Returns a state dict with the usual initialisation, random gamma and beta, and running statistics of one batch.

    With these weights activations neither vanish nor overflow, so that a wrong layer changes the output. The next case
    of the same network gets the same tensors, so copy them before you change them.
    """
    key = (repr(cfg), device, frames)
    if key not in _made:
        _made.clear()
        with torch.inference_mode(False), torch.no_grad():  # copies of inference tensors could not be trained
            _made[key] = _weights(cfg, device, frames)
    return dict(_made[key])


def _weights(cfg: JasperConfig, device: torch.device, frames: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(), device:
        torch.manual_seed(stable_seed("weights", repr(cfg.encoder)))
        model = EagerJasper(cfg)
    g = seeded(stable_seed("norms"), device)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm1d)):
        norm.weight.copy_(torch.rand(norm.num_features, generator=g, device=device) + 0.5)
        norm.bias.copy_(torch.randn(norm.num_features, generator=g, device=device) * 0.1)
        norm.momentum = 1.0
    with dropout_off(model):
        model.train()(*features(cfg, 1, frames, device, seed=0))
    return model.state_dict()


# With the weights of `clear`, the mean input of each ReLU is FAR standard deviations away from zero, and below zero in
# every OFF-th channel.
FAR, OFF = 6.0, 8


@torch.no_grad()
def clear(cfg: JasperConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns `state` changed such that no ReLU has an input near zero.

    With these weights the gradients of right contenders differ only by rounding. The betas of the norms before a ReLU
    add up to FAR standard deviations above zero, or in every OFF-th channel below zero. Except in depthwise convs, the
    weights of every tap are orthogonal to the mean m (C_in,) of their input. Otherwise m would add a large constant,
    which would hide the signal and change at the edges of an utterance. All parameters are representable in bf16, so
    that casting to bf16 does not change them.
    """
    made = dict(state)

    def orthogonal(name: str, m: Tensor | None) -> None:
        w = made[name].float()
        if m is not None:
            u = m / m.norm()
            w = w - torch.einsum("oik,i->ok", w, u)[:, None, :] * u[None, :, None]
        made[name] = w

    history: list[Tensor | None] = [None]  # the mean of each input of a block; None means zero, as for the features
    for b, block in enumerate(cfg.encoder.blocks):
        at, m = f"encoder.layers.{b}", history[-1]
        panes = (history if block.residual_dense else history[-1:]) if block.residual else []
        for r in range(block.repeat):
            place = f"{at}.conv.{4 * r}"
            if block.separable:
                taps, place = made[f"{at}.conv.{5 * r}.weight"].float(), f"{at}.conv.{5 * r + 1}"
                # All channels get the same taps up to a factor. Some taps see zeros at the edges of an utterance. An
                # input that is constant in time then changes there by the same factor in all channels.
                made[f"{at}.conv.{5 * r}.weight"] = taps = taps.flatten(1).norm(dim=1)[:, None, None] * taps[:1].sign()
                m = None if m is None else m * taps.sum((1, 2))
            orthogonal(f"{place}.weight", m)
            norm = f"{at}.conv.{5 * r + 2}" if block.separable else f"{at}.conv.{4 * r + 1}"
            variance, others = made[f"{norm}.weight"].square(), torch.zeros_like(made[f"{norm}.bias"])
            for k, pane in enumerate(panes if r == block.repeat - 1 else ()):
                orthogonal(f"{at}.res.{k}.0.weight", pane)
                variance = variance + made[f"{at}.res.{k}.1.weight"].square()
                others = others + made[f"{at}.res.{k}.1.bias"]
            on = torch.arange(variance.numel(), device=variance.device) % OFF != OFF - 1
            beta = FAR * variance.sqrt()
            made[f"{norm}.bias"] = torch.where(on, beta, -beta) - others
            m = beta * on
        history = [*history, m] if block.residual and block.residual_dense else [m]
    orthogonal("decoder.layers.0.weight", history[-1])
    held = {k for k, t in made.items() if t.is_floating_point() and "running" not in k}
    return {k: t.bfloat16().to(state[k].dtype) if k in held else t for k, t in made.items()}


def eager(cfg: JasperConfig, state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> EagerJasper:
    """Returns the eager model with a copy of these weights."""
    return _with_weights(lambda: EagerJasper(cfg), state, dtype)


def fused(cfg: JasperConfig, state: dict[str, Tensor], backend: str) -> Jasper:
    """Returns jasper_fast's model with a copy of these weights."""
    return _with_weights(lambda: Jasper(cfg, backend=backend), state, torch.float32)


def _with_weights(make: Callable[[], nn.Module], state: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):  # skips the random initialisation
        model = make()
    own = {k: v.detach().to(dtype if v.is_floating_point() else v.dtype, copy=True) for k, v in state.items()}
    model.load_state_dict(own, assign=True)
    return model.requires_grad_()


def features(
    cfg: JasperConfig, N: int, T: int, device: torch.device, seed: int, ragged: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns random features (N, C, T) and lengths (N,).

    All lengths are T, or, if `ragged`, the first is T and the others are random from T / 2 to T.
    """
    g = seeded(stable_seed("features", seed), device)
    x = torch.randn(N, cfg.encoder.in_feats, T, generator=g, device=device)
    lengths = torch.full((N,), T, dtype=torch.int64, device=device)
    if ragged:
        lengths = torch.randint(T // 2, T + 1, (N,), generator=g, device=device)
        lengths[0] = T
        x = mask(x, lengths)
    return x, lengths


def targets(N: int, frames: int, device: torch.device, seed: int, classes: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    """Returns random transcripts (N, U), short enough for `frames` output frames, and their lengths (N,).

    The last class is the blank, which does not occur in them.
    """
    g = seeded(stable_seed("targets", seed), device)
    U = max(1, frames // 12)
    return torch.randint(0, classes - 1, (N, U), generator=g, device=device), torch.full((N,), U, device=device)


def ctc(log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Returns the loss of NVIDIA's Jasper: the mean of the CTC losses of the utterances."""
    blank = log_probs.shape[2] - 1
    return F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths, blank, reduction="none").mean()


@contextlib.contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """A context in which the dropout rate is 0 in all Dropout modules, and in all blocks of a `Jasper`."""
    with contextlib.ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                undo.callback(setattr, module, "p", module.p)
                module.p = 0.0
            if isinstance(module, JasperBlock):
                undo.callback(setattr, module, "b", module.b)
                module.b = dataclasses.replace(module.b, dropout=0.0)
        yield


def valid(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Returns the log-probabilities with zeros in the rows t >= length."""
    return mask(log_probs.transpose(1, 2), lengths.to(log_probs.device)).transpose(1, 2)
