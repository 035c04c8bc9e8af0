"""Loads the weights of a file into a model."""

import contextlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from jasper_fast.nn.checkpoint import CheckpointError, refuse_endless
from jasper_fast.nn.config import ConfigError, JasperConfig
from jasper_fast.nn.formats import Weights, jasper10x5dr, published_labels, read_weights
from jasper_fast.nn.model import Jasper

DECODERS = ("auto", "keep", "new")


def load_weights(
    model: nn.Module,
    weights: Weights,
    *,
    labels: Sequence[str] | None = None,
    strict: bool = True,
    decoder: Literal["auto", "keep", "new"] = "auto",
    like: Mapping[str, str] | None = None,
) -> None:
    """Copies `weights` into `model`. A model on the meta device takes over the tensors of the file, and copies only
    those of another dtype or memory order.

    With `strict`, the file must have every entry of the model in the right shape, and no others, and must not name
    other labels. Otherwise this is a warm start: entries that are missing or have another shape keep their initial
    values, and a warning says so.

    `labels` are those of the model. If they differ from the file's labels, a warm start copies the decoder's rows for
    the blank and for the labels that both alphabets have. If the file does not name its labels, the decoder is copied
    only if the model has the published alphabet; otherwise it is initialised anew. Without `labels` it is copied if its
    shape fits. In a warm start `decoder="keep"` always copies the decoder, and "new" never does. `like` maps labels of
    the model to labels of the file: the row of a label starts as a copy of the row of the label to which it is mapped.
    With `like`, `decoder` must be "auto", and a file that does not name its labels is assumed to have the published
    alphabet. With `strict`, `decoder` and `like` have no effect.

    Raises CheckpointError for a file that is not as `strict` demands, if none of the encoder's weights fits, and for a
    `decoder` or `like` that cannot be applied to these labels.
    """
    own = model.state_dict()
    given, wrong, extra = compared(own, weights)
    head = [name for name in own if name.startswith("decoder.")]
    rows, reasons = None, []
    if strict:
        refuse_misfits(weights, wrong, extra)
        if labels is not None and weights.labels is not None and list(labels) != list(weights.labels):
            raise CheckpointError(f"{weights.path} was trained with other labels; pass strict=False for a warm start")
    else:
        misfit = next((wrong[name] for name in head if name in wrong), None)
        rows, reason = _decoder_rows(weights, labels, decoder, {name: own[name] for name in head}, misfit, like or {})
        if rows is not None:
            wrong |= dict.fromkeys(head, "new")
        reasons += [reason] if reason else []
        if weights.config and hasattr(model, "config"):
            configs = config_of(weights), model.config
            theirs, ours = (config.filterbank.get("convention", "reference") for config in configs)
            if theirs != ours:
                reasons.append(
                    f"its features follow the convention {theirs!r}, but the model's configuration says {ours!r} "
                    f"(filterbank_features.convention)"
                )
    rest = [name for name in wrong if name not in head]
    if rest:
        reasons.append(f"{len(rest)} entries keep their initial values; the first is {rest[0]} ({wrong[rest[0]]})")
    fitting = {name: given[name] for name in own if name not in wrong}
    if not any(name.startswith("encoder.") and name.endswith("weight") for name in fitting):
        raise CheckpointError(
            f"{weights.path} ({weights.kind}): none of its weights fits this model; check the configuration"
        )
    if extra:
        reasons.append(f"{len(extra)} entries of the file are not used; the first is {extra[0]}")
    if reasons:
        warnings.warn(f"warm start from {weights.path}: {'; '.join(reasons)}", stacklevel=2)
    if any(tensor.is_meta for tensor in own.values()):
        model.load_state_dict({name: t.to(own[name].dtype).contiguous() for name, t in fitting.items()}, assign=True)
        return
    with torch.no_grad():
        for name, tensor in fitting.items():
            own[name].copy_(tensor)
        if rows:
            to, source = map(list, zip(*rows, strict=True))
            for name in head:
                own[name][to] = given[name][source].to(own[name])


def compared(own: dict[str, Tensor], weights: Weights) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Compares a file's entries with those of a model, `own`. Returns (entries, faults, extra).

    entries: those of the file, and zeros for batch counters, which PyTorch before 0.4.1 did not save. faults: by name,
    why an entry of the model cannot be taken from the file. extra: names that the model does not have.
    """
    given = dict(weights.state_dict)
    for name in own:
        if name.endswith("num_batches_tracked"):
            given.setdefault(name, torch.zeros((), dtype=torch.int64))
    wrong = {name: f"{tuple(given[name].shape)} instead of {tuple(t.shape)}" for name, t in own.items()
             if name in given and given[name].shape != t.shape}  # fmt: skip
    wrong |= {name: "missing" for name in own if name not in given}
    return given, wrong, [name for name in given if name not in own]


def refuse_misfits(weights: Weights, wrong: dict[str, str], extra: list[str]) -> None:
    """Raises CheckpointError if any entry does not fit, and names the entries."""
    listed = [f"{name}: {why}" for name, why in wrong.items()] + [f"{name}: not part of the model" for name in extra]
    if listed:
        raise CheckpointError(
            f"{weights.path} ({weights.kind}) does not fit the model; {len(listed)} entries differ: "
            f"{'; '.join(listed[:4])}{'; ...' if len(listed) > 4 else ''}. Pass the configuration it was trained with, "
            f"or strict=False to start from the entries that fit"
        )


def _decoder_rows(
    weights: Weights,
    labels: Sequence[str] | None,
    decoder: str,
    head: dict[str, Tensor],
    misfit: str | None,
    like: Mapping[str, str],
) -> tuple[list[tuple[int, int]] | None, str | None]:
    """Returns (rows, message): what a warm start does with the decoder.

    rows: pairs of a row of the model and the row of the file that is copied to it. None copies all rows, and [] none.
    message: a warning for the user, or None. `head`: the model's decoder. `misfit`: why the file's decoder does not fit
    it, or None.
    """
    if like and decoder != "auto":
        raise CheckpointError(f"labels that take the rows of others need the decoder 'auto', not {decoder!r}")
    if decoder == "keep":
        if misfit:
            raise CheckpointError(f"{weights.path}: its decoder cannot be kept ({misfit})")
        return None, None
    if decoder == "new":
        return [], "the decoder is initialised anew, because of decoder='new'"
    old = _row_of_label(weights, labels, like)
    if labels is None:
        return ([], f"the decoder is initialised anew ({misfit})") if misfit else (None, None)
    if weights.labels is None and not like:
        if misfit or list(labels) != published_labels():
            why = misfit or "the file does not name its labels; decoder='keep' would copy its rows unchanged"
            return [], f"the decoder is initialised anew ({why})"
        return None, "the file does not name its labels; its decoder is assumed to be for space, a to z, '"
    if list(labels) == list(old) and not misfit and not like:
        return None, None
    shapes = {name: entry.shape for name, entry in weights.state_dict.items()}
    same_width = all(shapes.get(name) == (len(old) + 1, *entry.shape[1:]) for name, entry in head.items())
    sources = {label: like.get(label, label) for label in labels}
    shared = [(i, old[sources[label]]) for i, label in enumerate(labels) if sources[label] in old]
    if not same_width or not shared:
        return [], f"the decoder is initialised anew ({misfit or 'other labels'})"
    rows = f"its rows for the blank and for {len(shared)} of the {len(labels)} labels are copied"
    return [*shared, (len(labels), len(old))], f"the decoder is initialised anew for other labels, except that {rows}"


def label_pair(text: str) -> tuple[str, str]:
    """Splits "NEW=OLD" into a pair of labels. Raises CheckpointError for other texts."""
    new, sign, old = text[1:].partition("=")  # the first symbol may itself be "="
    if not sign or not old:
        raise CheckpointError(f"{text!r} does not name a new label and an old one, as 'ä=a' does")
    return text[0] + new, old


def _row_of_label(weights: Weights, labels: Sequence[str] | None, like: Mapping[str, str]) -> dict[str, int]:
    """Returns the decoder's row of each label of the file. A file that does not name its labels is assumed to have the
    published alphabet. Raises CheckpointError for labels in `like` that the model or the file does not have."""
    known = weights.labels or published_labels()
    for new, source in like.items():
        if new not in (labels or ()):
            raise CheckpointError(f"the label {new!r}, which is to start from {source!r}, is not one of the model's")
        if source not in known:
            raise CheckpointError(f"{weights.path} has no label {source!r} for {new!r} to start from: {known}")
    return {label: i for i, label in enumerate(known)}


def config_of(weights: Weights) -> JasperConfig:
    """Returns the configuration in the file. For files without one, such as NVIDIA's, returns that of Jasper 10x5 dense
    residual.

    Raises CheckpointError for a configuration that is not a Jasper's, or that has more layers than there are weights.
    """
    bias = weights.state_dict.get("decoder.layers.0.bias")
    document = weights.config or jasper10x5dr(29 if bias is None else bias.numel())
    refuse_endless(document, f"{weights.path}: its configuration")
    try:
        json.dumps(document)  # raises if there is anything but plain values
        config = JasperConfig.from_dict(document)
    except (ConfigError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{weights.path}: its configuration is not a Jasper's ({error})") from error
    if weights.config and sum(block.repeat for block in config.encoder.blocks) > len(weights.state_dict):
        raise CheckpointError(f"{weights.path}: its configuration has more layers than it has weights")
    return config


def load_model(
    path: str | Path,
    *,
    config: JasperConfig | None = None,
    ema: bool = False,
    backend: str = "auto",
    strict: bool = True,
) -> Jasper:
    """Returns a Jasper in evaluation mode with the weights in `path`, a file that `read_weights` understands.

    `config`: the model to build, by default that of the file (see `config_of`). `strict=False` makes a warm start, for
    example with a `config` for other labels (see `load_weights`). Raises CheckpointError if the file cannot be read or
    does not fit, MissingExtra for a safetensors file without that package, and BackendMissing for a backend that cannot
    run here.
    """
    weights = read_weights(path, ema=ema)
    config = config or config_of(weights)
    # With `strict` all tensors come from the file, so the model needs no memory of its own.
    with torch.device("meta") if strict else contextlib.nullcontext():
        model = Jasper(config, backend=backend)
    load_weights(model, weights, labels=config.labels, strict=strict)
    return model.eval()
