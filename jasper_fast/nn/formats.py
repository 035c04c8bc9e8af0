"""Reads the weights in checkpoints of this project, of NVIDIA's Jasper and of NeMo, under one set of names."""

import functools
import io
import operator
import re
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from jasper_fast.nn import tensor_file
from jasper_fast.nn.checkpoint import FORMAT, CheckpointError, first_line, load, read, refuse_endless
from jasper_fast.nn.config import JasperConfig, is_texts


@dataclass
class Weights:
    """Weights under this project's names, and what their file says about the model. `kind`: the file's layout."""

    path: Path
    kind: str
    state_dict: dict[str, Tensor]
    config: dict[str, Any] | None = None
    labels: list[str] | None = None
    average: dict[str, Tensor] | None = None  # the file's moving average, unless `state_dict` is the average itself
    names: dict[str, str] = field(default_factory=dict)  # this project's names -> names of the entries in the file
    left_out: list[str] = field(default_factory=list)  # names of the other contents of the file


def read_weights(path: str | Path, *, ema: bool = False) -> Weights:
    """Reads the weights in a file of any known layout. With `ema`, reads the moving average instead.

    Known layouts are this project's checkpoints; NVIDIA's Jasper for PyTorch of 2021 and later (`encoder.layers.*`) and
    of 2019 and 2020 (`jasper_encoder.encoder.*`); NVIDIA's QuartzNet; bare state dicts and safetensors files of any of
    these; NeMo's `.nemo` archives, compressed or not; NeMo's pairs of files (`JasperEncoder-*.pt` and
    `JasperDecoderForCTC-*.pt`, of which `path` is one); and checkpoints of Lightning. The model may have been wrapped
    by `torch.compile` or DistributedDataParallel. Raises CheckpointError naming the file for anything else, and if
    `ema` is true and the file has no moving average; and MissingExtra for a safetensors file without that package.
    """
    path = Path(path)
    if path.is_file() and tarfile.is_tarfile(path):  # first, because zipfile takes a tar that ends in a zip
        if ema:
            raise CheckpointError(f"{path}: a NeMo archive has no moving average; load it without ema")
        return _read_nemo(path)
    state = tensor_file.read(path) if tensor_file.is_one(path) else load(path)
    chosen, other = ("ema_state_dict", "state_dict") if ema else ("state_dict", "ema_state_dict")
    if ema and not (isinstance(state.get(chosen), dict) and state[chosen]):
        raise CheckpointError(f"{path} has no moving average (ema_state_dict); load it without ema")
    entries, others = state.get(chosen, state), state.get(other)
    if not _is_state_dict(entries):
        raise CheckpointError(f"{path} holds no model: there is no 'state_dict' among {', '.join(map(str, state))}")
    plain, drop, rules = list(map(_unwrapped, entries)), (), ()
    kind = "jasper_fast" if state.get("format") == FORMAT else "reference v2"
    if half := _nemo_half(plain):
        entries = entries | _other_half(path, half)
        kind, rules = "NeMo", (*_NEMO_HALVES, *_NEMO)
    elif any(name.startswith("jasper_encoder.") for name in plain):
        kind, rules, drop = "reference v1", _V1, ("acoustic_model.", "audio_preprocessor.")
    elif any(name.startswith("encoder.encoder.") for name in plain):
        kind, rules, drop = "NeMo", _NEMO, _NEMO_DROP
    elif kind == "reference v2" and any(re.match(r"encoder\.layers\.\d+\.mconv\.", name) for name in plain):
        rules = _QUARTZNET
    found = _named_ours(path, kind, entries, rules, drop)
    found.left_out += [str(k) for k, v in state.items() if entries is not state and k not in _READ and v is not None]
    if kind == "jasper_fast":
        found.config, found.labels = state.get("config"), state.get("labels")
        if not (found.labels is None or is_texts(found.labels)):
            raise CheckpointError(f"{path}: its labels are not a list of texts")
    else:
        refuse_endless(state.get("hyper_parameters"), f"{path}: hyper_parameters")
        found.labels = _lightning_labels(state.get("hyper_parameters"))
    if not ema and _is_state_dict(others) and others.keys() == entries.keys():
        found.average = {ours: others[name] for ours, name in found.names.items()}
    elif others is not None and entries is not state:
        found.left_out.append(other)
    return found


_READ = ("format", "config", "labels", "state_dict", "ema_state_dict", "hyper_parameters")


def _is_state_dict(entries: Any) -> bool:
    return isinstance(entries, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in entries.items())


def _unwrapped(name: str) -> str:
    """Returns the name without the prefixes of torch.compile, DistributedDataParallel and Lightning modules."""
    name = name.replace("_orig_mod.", "")
    while name.startswith(("module.", "model.")):
        name = name.partition(".")[2]
    return name


def _lightning_labels(settings: Any) -> list[str] | None:
    """Returns the alphabet in a Lightning checkpoint's `hyper_parameters`: the decoder's `vocabulary` (NeMo), else
    `labels`, also in a nested `cfg`, `config` or `model`; otherwise None."""
    if not isinstance(settings, dict):
        return None
    decoder = settings.get("decoder")
    found = (decoder.get("vocabulary") if isinstance(decoder, dict) else None) or settings.get("labels")
    if is_texts(found):
        return list(found)
    return next(filter(None, (_lightning_labels(settings.get(key)) for key in ("cfg", "config", "model"))), None)


_HALVES = {"JasperEncoder": r"^encoder\.\d+\.", "JasperDecoderForCTC": r"^decoder_layers\."}
_NEMO_HALVES = ((r"^encoder\.(\d+)\.", r"encoder.encoder.\1."), (r"^decoder_layers\.", "decoder.decoder_layers."))


def _nemo_half(names: Sequence[str]) -> str | None:
    """Returns which of the two modules of NeMo 0.x has entries with these names; None if neither has."""
    halves = (half for half, pattern in _HALVES.items() if names and all(re.match(pattern, name) for name in names))
    return next(halves, None)


def _other_half(path: Path, half: str) -> dict[str, Tensor]:
    """Returns the entries of the file that NeMo 0.x saved next to `path`. `half`: the module that `path` holds."""
    (other,) = _HALVES.keys() - {half}
    beside = path.with_name(path.name.replace(half, other))
    if beside == path or not beside.is_file():
        name = beside.name if beside != path else f"{other}-*.pt"
        raise CheckpointError(
            f"{path} is one of NeMo's two files, the {half}; put the other, {name}, into the same folder"
        )
    entries = load(beside)
    if not _is_state_dict(entries) or _nemo_half(list(map(_unwrapped, entries))) != other:
        raise CheckpointError(f"{beside} does not hold the {other} that belongs to {path}")
    return entries


def published_labels() -> list[str]:
    """Returns the alphabet of the published Jasper, which its files do not contain: space, a to z, apostrophe."""
    return list(JasperConfig.from_yaml(files("jasper_fast.configs") / "jasper10x5dr.yaml").labels)


def jasper10x5dr(n_classes: int = 29) -> dict[str, Any]:
    """Returns the configuration of the published dense-residual Jasper 10x5 (332,632,349 parameters at 29 classes)."""
    encoder = JasperConfig.from_yaml(files("jasper_fast.configs") / "jasper10x5dr.yaml").to_dict()["jasper"]["encoder"]
    return {"encoder": encoder, "decoder": {"in_feats": 1024, "n_classes": n_classes}}


_V1 = ((r"^jasper_encoder\.encoder\.", "encoder.layers."), (r"^jasper_decoder\.decoder_layers\.", "decoder.layers."))
# NVIDIA's QuartzNet names its convs mconv, as NeMo does, but does not wrap them in masked convs.
_QUARTZNET = ((r"^(encoder\.layers\.\d+)\.mconv\.", r"\1.conv."),)
_NEMO_DROP = ("preproc", "spec_aug")
_NEMO = (
    (r"^encoder\.encoder\.", "encoder.layers."),
    (r"^decoder\.decoder_layers\.", "decoder.layers."),
    (r"\.mconv\.", ".conv."),
    (r"^(encoder\..*\.\d+)\.conv\.weight$", r"\1.weight"),  # the convolution inside a masked convolution
)


def renamed(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """Returns `name` after the substitutions of `rules`, pairs (pattern, replacement), in order."""
    return functools.reduce(lambda name, rule: re.sub(*rule, name), rules, name)


def _named_ours(
    path: Path, kind: str, entries: dict[str, Tensor], rules: Sequence[tuple[str, str]] = (), drop: Sequence[str] = ()
) -> Weights:
    """Renames the entries to this project's names by `rules`: pairs (pattern, replacement). Leaves out entries whose
    names contain a string of `drop`."""
    names, dropped = {}, []
    for name in entries:
        ours = _unwrapped(name)
        if any(part in ours for part in drop):
            dropped.append(name)
            continue
        ours = renamed(ours, rules)
        if ours in names:
            raise CheckpointError(f"{path}: its entries {names[ours]} and {name} both mean {ours}")
        names[ours] = name
    return Weights(path, kind, {k: entries[name] for k, name in names.items()}, names=names, left_out=dropped)


def _read_nemo(path: Path) -> Weights:
    """Reads a `.nemo` archive in memory, without unpacking it: `model_config.yaml` and `model_weights.ckpt`."""
    import yaml

    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                place = PurePosixPath(member.name)
                if place.is_absolute() or ".." in place.parts:
                    raise CheckpointError(f"it contains the path {member.name!r}, which leads out of the archive")
                if member.isfile() and place.name in ("model_config.yaml", "model_weights.ckpt"):
                    members[place.name] = archive.extractfile(member).read()
        if len(members) < 2:
            raise CheckpointError(
                f"{path} is a tar archive without model_config.yaml and model_weights.ckpt, so it is not NeMo's"
            )
        document = yaml.safe_load(members["model_config.yaml"])
        refuse_endless(document, f"{path}: model_config.yaml")
        entries = read(io.BytesIO(members["model_weights.ckpt"]), f"{path}: model_weights.ckpt")
        if not _is_state_dict(entries):
            raise CheckpointError("model_weights.ckpt holds no state dict")
        config = _nemo_config(document)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path}: its model_config.yaml does not describe a Jasper (at {error})") from error
    except (tarfile.TarError, EOFError, OSError, RuntimeError, zlib.error, yaml.YAMLError) as error:
        if isinstance(error, CheckpointError):
            raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from None
        raise CheckpointError(
            f"{path} is not a complete NeMo archive ({first_line(error)}); copy or download it again"
        ) from error
    found = _named_ours(path, "NeMo", entries, _NEMO, _NEMO_DROP)
    found.config, found.labels = config, config["labels"]
    return found


def _nemo_config(document: dict[str, Any]) -> dict[str, Any]:
    """Returns NeMo's configuration in the form of `JasperConfig.to_dict`. Raises CheckpointError for a tokenizer, and
    for blocks and features that are not supported here."""
    document = _resolved(document)
    refuse_endless(document, "model_config.yaml")
    if document.get("tokenizer"):
        raise CheckpointError("the NeMo model has a tokenizer: its symbols are word pieces, but a Jasper's are letters")
    encoder, decoder = document["encoder"], document["decoder"]
    labels = list(decoder.get("vocabulary") or document.get("labels") or ()) or None
    blocks = []
    for i, block in enumerate(encoder["jasper"]):
        said = encoder | block  # for example, a block without a residual_mode has that of the encoder
        foreign = [k for k, usual in _NEMO_USUAL.items() if said.get(k, usual[0]) not in usual]
        if foreign:
            raise CheckpointError(
                f"block {i} of the NeMo model has {foreign[0]}={said[foreign[0]]}, so it is neither a Jasper nor a "
                f"QuartzNet (a Citrinet cannot be loaded)"
            )
        kernel, stride, dilation = (_one(block.get(k, 1)) for k in ("kernel", "stride", "dilation"))
        if kernel % 2 == 0:
            raise CheckpointError(
                f"block {i} of the NeMo model has the even kernel {kernel}, which NeMo pads differently"
            )
        blocks.append(
            {
                "filters": block["filters"], "repeat": block["repeat"], "kernel_size": [kernel], "stride": [stride],
                "dilation": [dilation], "dropout": float(block.get("dropout", 0.0)),
                "residual": bool(block.get("residual", False)),
                "residual_dense": bool(block.get("residual_dense", False)),
                "separable": bool(block.get("separable", False)),
            }
        )  # fmt: skip
    n_classes = decoder.get("num_classes", -1)
    n_classes = len(labels) if labels and (n_classes is None or n_classes < 1) else n_classes
    features = _nemo_features(document.get("preprocessor") or {})
    return {
        "labels": labels,
        "input_val": {"audio_dataset": {"sample_rate": features["sample_rate"]}, "filterbank_features": features},
        "jasper": {
            "encoder": {
                "in_feats": encoder["feat_in"],
                "activation": encoder.get("activation", "relu"),
                "use_conv_masks": bool(encoder.get("conv_mask", True)),
                "blocks": blocks,
            },
            "decoder": {"in_feats": decoder["feat_in"], "n_classes": n_classes + 1},
        },
    }


# Settings of NeMo's blocks, and the values that they may have in a Jasper or a QuartzNet, the default first.
_NEMO_USUAL = {
    "se": (False, None), "stride_last": (False, None), "groups": (1,), "heads": (-1,), "future_context": (-1,),
    "residual_mode": ("add", "stride_add"), "normalization_mode": ("batch",),
}  # fmt: skip

# Keys of NeMo's AudioToMelSpectrogramPreprocessor. NEMO_FEATURES: NeMo's key -> (key here, default). _NEMO_ONLY: keys
# that are supported only with this value. _NEMO_IDLE: keys that do not change the features in evaluation.
NEMO_FEATURES = {
    "sample_rate": ("sample_rate", 16000), "window_size": ("window_size", 0.02),
    "window_stride": ("window_stride", 0.01), "window": ("window", "hann"), "normalize": ("normalize", "per_feature"),
    "n_fft": ("n_fft", None), "preemph": ("preemph", 0.97), "features": ("n_filt", 64), "lowfreq": ("lowfreq", 0),
    "highfreq": ("highfreq", None), "log": ("log", True), "log_zero_guard_type": ("log_zero_guard_type", "add"),
    "log_zero_guard_value": ("log_zero_guard_value", 2**-24), "dither": ("dither", 1e-5), "pad_to": ("pad_align", 16),
    "frame_splicing": ("frame_splicing", 1), "mag_power": ("mag_power", 2.0),
}  # fmt: skip
_NEMO_ONLY = {"n_window_size": None, "n_window_stride": None, "exact_pad": False, "stft_exact_pad": False,
              "pad_value": 0, "mel_norm": "slaney", "frame_splicing": 1}  # fmt: skip
_NEMO_IDLE = {"_target_", "cls", "rng", "nb_augmentation_prob", "nb_max_freq", "use_torchaudio", "stft_conv"}
NEMO_TARGET = "AudioToMelSpectrogramPreprocessor"


def _nemo_features(front: dict[str, Any]) -> dict[str, Any]:
    """Returns NeMo's `preprocessor` as `filterbank_features`. Raises CheckpointError naming an unsupported setting."""
    known = NEMO_FEATURES.keys() | _NEMO_ONLY.keys() | _NEMO_IDLE
    wrong = [key for key in front if key not in known]
    wrong += [key for key, only in _NEMO_ONLY.items() if front.get(key, only) != only]
    wrong += [key for key in ("_target_", "cls") if str(front.get(key, NEMO_TARGET)).split(".")[-1] != NEMO_TARGET]
    features = {ours: front.get(theirs, default) for theirs, (ours, default) in NEMO_FEATURES.items()}
    normalize, guard, limits = features["normalize"], features["log_zero_guard_value"], torch.finfo(torch.float32)
    fits = {
        "normalize": not isinstance(normalize, str) or normalize in ("per_feature", "all_features"),
        "log_zero_guard_type": features["log_zero_guard_type"] in ("add", "clamp"),
        "log_zero_guard_value": not isinstance(guard, str) or guard in ("tiny", "eps"),
        "pad_to": isinstance(features["pad_align"], int),
    }
    wrong += [key for key, good in fits.items() if not good]
    if wrong:
        raise CheckpointError(
            f"preprocessor.{wrong[0]}={front[wrong[0]]!r} of the NeMo model is not supported, so the features that it "
            f"was trained on cannot be computed here"
        )
    features["normalize"] = normalize or None  # null, or false in older files, means no normalisation
    if isinstance(guard, str):
        features["log_zero_guard_value"] = getattr(limits, guard)
    return features | {"pad_align": features["pad_align"] or 1, "convention": "nemo"}


def _one(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def _resolved(document: dict[str, Any]) -> dict[str, Any]:
    """Returns `document` with every `${a.b}` replaced by the value at that path. `model.` may begin the path."""

    @functools.cache  # without it, a short document whose values refer to each other can take exponential time
    def at(path: str) -> Any:
        return resolved(functools.reduce(operator.getitem, path.removeprefix("model.").split("."), document))

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: resolved(v) for k, v in value.items()}
        if isinstance(value, list):
            return list(map(resolved, value))
        match = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        return at(match[1]) if match else value

    return resolved(document)
