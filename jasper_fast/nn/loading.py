"""Weights of a file put into a model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from jasper_fast.nn.checkpoint import CheckpointError
from jasper_fast.nn.config import JasperConfig
from jasper_fast.nn.formats import Weights, jasper10x5dr, read_weights
from jasper_fast.nn.model import Jasper


def load_weights(
    model: nn.Module, weights: Weights, *, labels: Sequence[str] | None = None, strict: bool = True
) -> None:
    """Copies `weights` into `model`, or, if that stands on the meta device, makes them its own.

    With `strict` every entry must be there in the right shape. Without, this is a warm start: a decoder of another size
    or for other `labels`, and whatever else is missing or of another shape, keeps its fresh initialisation, and a
    warning says so. Raises CheckpointError naming the entries, and also if no entry of the encoder fits.
    """
    own, given = model.state_dict(), dict(weights.state_dict)
    for name in own:  # files of PyTorch 0.4 lack the counters
        if name.endswith("num_batches_tracked"):
            given.setdefault(name, torch.zeros((), dtype=torch.int64))
    wrong = {name: f"{tuple(given[name].shape)} instead of {tuple(t.shape)}" for name, t in own.items()
             if name in given and given[name].shape != t.shape}  # fmt: skip
    wrong |= {name: "missing" for name in own if name not in given}
    extra = [name for name in given if name not in own]
    if strict and (wrong or extra):
        listed = [f"{name}: {why}" for name, why in wrong.items()] + [
            f"{name}: not part of the model" for name in extra
        ]
        raise CheckpointError(
            f"{weights.path} ({weights.kind}) does not fit the model, {len(listed)} entries differ: "
            f"{'; '.join(listed[:4])}{'; ...' if len(listed) > 4 else ''}. Pass the configuration it was trained with, "
            f"or strict=False to start from the entries that fit"
        )
    reasons = []
    other = labels is not None and weights.labels is not None and list(labels) != list(weights.labels)
    decoder = [name for name in own if name.startswith("decoder.")]
    if other or any(name in wrong for name in decoder):
        if strict:
            raise CheckpointError(f"{weights.path} was trained with other labels; pass strict=False for a warm start")
        reasons.append(f"the decoder is initialised anew ({'other labels' if other else wrong[decoder[0]]})")
        wrong |= dict.fromkeys(decoder, "new")
    rest = [name for name in wrong if name not in decoder]
    if rest:
        reasons.append(f"{len(rest)} entries keep their initial values, the first is {rest[0]} ({wrong[rest[0]]})")
    fitting = {name: given[name] for name in own if name not in wrong}
    if not any(name.startswith("encoder.") and name.endswith("weight") for name in fitting):
        raise CheckpointError(
            f"{weights.path} ({weights.kind}): no weight of it fits this model; check the configuration"
        )
    if extra:
        reasons.append(f"{len(extra)} entries of the file are not used, the first is {extra[0]}")
    if reasons:
        warnings.warn(f"warm start from {weights.path}: {'; '.join(reasons)}", stacklevel=2)
    if any(tensor.is_meta for tensor in own.values()):
        entries = {name: tensor.to(own[name].dtype).contiguous() for name, tensor in fitting.items()}
        model.load_state_dict(entries, assign=True)
        return
    with torch.no_grad():
        for name, tensor in fitting.items():
            own[name].copy_(tensor)


def load_model(
    path: str | Path,
    *,
    config: JasperConfig | None = None,
    ema: bool = False,
    backend: str = "auto",
    strict: bool = True,
) -> Jasper:
    """A Jasper in evaluation mode with the weights in `path`; see `read_weights` for the files it understands.

    `config`: the model to build; default what the file says, and Jasper 10x5 dense residual for a file of NVIDIA's,
    which says nothing. `strict=False` with a `config` for other labels is a warm start: a new decoder, and a warning.
    Raises CheckpointError where the file is not readable or does not fit.
    """
    weights = read_weights(path, ema=ema)
    if config is None:
        bias = weights.state_dict.get("decoder.layers.0.bias")
        document = weights.config or jasper10x5dr(29 if bias is None else bias.numel())
        config = JasperConfig.from_dict(document)
    if strict:  # every entry comes from the file: compare shapes, then take the tensors as they are
        with torch.device("meta"):
            model = Jasper(config, backend=backend)
        load_weights(model, weights, labels=config.labels)
    else:
        model = Jasper(config, backend=backend)
        load_weights(model, weights, labels=config.labels, strict=False)
    return model.eval()
