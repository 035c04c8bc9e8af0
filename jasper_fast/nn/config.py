"""Jasper's configuration: YAML files and dictionaries in the form of NVIDIA's Jasper, checked key by key."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the key, and the file if there is one."""


def refuse(kind: type[Exception], *faults: tuple[object, str]) -> None:
    """Raises an error of this `kind` with the message of the first pair (applies, message) that applies."""
    for applies, message in faults:
        if applies:
            raise kind(message)


@dataclass(frozen=True)
class BlockConfig:
    """One block: `repeat` sub-blocks of conv, batch norm, ReLU and dropout. The keys are NVIDIA's.

    separable: each conv is a depthwise conv with this kernel, stride and dilation, followed by a pointwise conv, as in
    QuartzNet.
    """

    filters: int
    repeat: int = 1
    kernel_size: tuple[int, ...] = (11,)
    stride: tuple[int, ...] = (1,)
    dilation: tuple[int, ...] = (1,)
    dropout: float = 0.2
    residual: bool = True
    residual_dense: bool = False
    separable: bool = False

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "dilation"):
            value = getattr(self, name)
            (one,) = value if isinstance(value, (list, tuple)) and len(value) == 1 else (value,)
            if type(one) is not int or one < 1:
                raise ConfigError(f"{name} must be a list of one positive integer such as [11], not {value!r}")
            object.__setattr__(self, name, (one,))
        few = f"filters and repeat must be at least 1, not {self.filters} and {self.repeat}"
        panes = "a residual block needs stride 1, because its panes are 1x1 convolutions at stride 1"
        refuse(
            ConfigError,
            (self.filters < 1 or self.repeat < 1, few),
            (not 0.0 <= self.dropout < 1.0, f"dropout must lie in [0, 1), not {self.dropout}"),
            (self.s > 1 and self.d > 1, "a block cannot have both stride > 1 and dilation > 1"),
            (self.residual and self.s > 1, panes),
        )

    @property
    def k(self) -> int:
        return self.kernel_size[0]

    @property
    def s(self) -> int:
        return self.stride[0]

    @property
    def d(self) -> int:
        return self.dilation[0]

    @property
    def padding(self) -> int:
        """Frames of zero padding on each side: `(k // 2) * d`, as in NVIDIA's Jasper."""
        return (self.k // 2) * self.d

    @property
    def resizes(self) -> bool:
        """Whether the convs change the number of frames, as a stride or an even kernel does."""
        return self.s > 1 or self.k % 2 == 0

    @property
    def dense(self) -> bool:
        """Whether the block appends its output to the list of block outputs that panes can read. The output of a block
        that is not dense replaces that list."""
        return self.residual and self.residual_dense

    def out_length(self, length):
        """Returns the number of output frames for `length` input frames (an int or an integer tensor)."""
        return (length + 2 * self.padding - self.d * (self.k - 1) - 1) // self.s + 1


@dataclass(frozen=True)
class EncoderConfig:
    """The stack of blocks. `use_conv_masks` sets the padding to zero before every convolution."""

    in_feats: int = 64
    activation: str = "relu"
    frame_splicing: int = 1
    init: str = "xavier_uniform"
    use_conv_masks: bool = True
    blocks: tuple[BlockConfig, ...] = ()

    def __post_init__(self) -> None:
        kernels = f"activation {self.activation!r} has no fused kernel; use 'relu', as every published Jasper does"
        refuse(
            ConfigError,
            (self.activation != "relu", kernels),
            (
                self.frame_splicing != 1,
                f"frame_splicing must be 1, not {self.frame_splicing}: no other value is supported",
            ),
            (self.init not in INITS, f"init {self.init!r} is not one of {', '.join(INITS)}"),
            (not self.blocks, "blocks is empty: a Jasper needs at least one block"),
            (self.in_feats < 1, f"in_feats must be at least 1, not {self.in_feats}"),
        )

    @property
    def stride(self) -> int:
        """Frames of the input for each frame of the output."""
        return math.prod(block.s**block.repeat for block in self.blocks)


@dataclass(frozen=True)
class DecoderConfig:
    """The last 1x1 convolution, from `in_feats` channels to `n_classes` symbols, the blank last."""

    in_feats: int
    n_classes: int
    init: str = "xavier_uniform"

    def __post_init__(self) -> None:
        refuse(
            ConfigError,
            (self.init not in INITS, f"init {self.init!r} is not one of {', '.join(INITS)}"),
            (self.n_classes < 1, f"n_classes must be at least 1, not {self.n_classes}"),
        )


INITS = ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal")
_TOP_KEYS = ("name", "labels", "input_val", "input_train", "jasper")
_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}  # annotation: types that fit it


@dataclass(frozen=True)
class JasperConfig:
    """A Jasper BxR model, with the alphabet and the input settings of its YAML file.

    `input_train` and `input_val` are dictionaries as in NVIDIA's files (`audio_dataset`, `filterbank_features`,
    `spec_augment`, `cutout_augment`). The keys come from NVIDIA's `jasper/config.py` and `configs/*.yaml`.
    """

    encoder: EncoderConfig
    decoder: DecoderConfig
    name: str = "Jasper"
    labels: tuple[str, ...] | None = None
    input_train: dict[str, Any] = field(default_factory=dict)
    input_val: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        last, symbols = self.encoder.blocks[-1].filters, len(self.labels or ())
        feats, classes = self.decoder.in_feats, self.decoder.n_classes
        wrong = f"decoder.n_classes is {classes}, but {symbols} labels and the blank make {symbols + 1}"
        refuse(
            ConfigError,
            (feats != last, f"decoder.in_feats is {feats}, but the last block has {last} filters"),
            (self.labels is not None and classes != symbols + 1, wrong),
        )

    @property
    def filterbank(self) -> dict[str, Any]:
        """The settings of the features in evaluation: `filterbank_features` of `input_val`, or of `input_train` if
        `input_val` is empty."""
        return (self.input_val or self.input_train).get("filterbank_features") or {}

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> JasperConfig:
        """Reads `{"encoder": {...}, "decoder": {...}}`, or a whole YAML document with these two under `jasper`.

        Raises ConfigError naming an unknown, missing or impossible key. `config` is not changed.
        """
        top = _mapping(config, "the configuration")
        if not top.keys() & {"encoder", "decoder"} or "jasper" in top:
            _check_keys(top, _TOP_KEYS, ("jasper",))
        model = _mapping(top.get("jasper", {k: v for k, v in top.items() if k not in _TOP_KEYS}), "jasper")
        _check_keys(model, ("encoder", "decoder"), ("encoder", "decoder"))
        encoder, decoder = (_mapping(model[part], part) for part in ("encoder", "decoder"))
        labels, blocks = top.get("labels"), encoder.get("blocks", ())
        quotes = "labels must be a list of texts; in YAML, numbers, yes, no and null need quotes"
        uncounted = "decoder.n_classes is missing, and cannot be counted without labels"
        refuse(
            ConfigError,
            (labels is not None and not is_texts(labels), quotes),
            (not isinstance(blocks, (list, tuple)), f"encoder.blocks must be a list, not {type(blocks).__name__}"),
            (labels is None and "n_classes" not in decoder, uncounted),
        )
        blocks = tuple(
            _build(BlockConfig, _mapping(b, f"encoder.blocks[{i}]"), f"encoder.blocks[{i}]")
            for i, b in enumerate(blocks)
        )
        return cls(
            encoder=_build(EncoderConfig, encoder | {"blocks": blocks}, "encoder"),
            decoder=_build(DecoderConfig, {"n_classes": len(labels or ()) + 1} | decoder, "decoder"),
            name=top.get("name", "Jasper"),
            labels=None if labels is None else tuple(labels),
            input_train=_settings(top, "input_train"),
            input_val=_settings(top, "input_val"),
        )

    @classmethod
    def from_yaml(cls, path: str | Path) -> JasperConfig:
        """Reads a YAML file in the form of NVIDIA's. Raises ConfigError naming the file and the key."""
        import yaml

        path = Path(path)
        if path.suffix == ".toml":
            raise ConfigError(f"{path}: TOML was the format of NVIDIA's first Jasper; convert the file to YAML")
        try:
            return cls.from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such configuration file") from None
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Returns a dictionary of plain types, from which `from_dict` makes an equal configuration."""
        found = as_dict(self)
        return found | {"jasper": {part: found.pop(part) for part in ("encoder", "decoder")}}


def as_dict(config: JasperConfig | BlockConfig) -> dict[str, Any]:
    """Returns the fields of `config`, with lists for tuples."""
    return dataclasses.asdict(
        config, dict_factory=lambda fields: {k: list(v) if isinstance(v, tuple) else v for k, v in fields}
    )


def is_texts(labels: Any) -> bool:
    """Returns whether `labels` is a list or tuple of texts."""
    return isinstance(labels, (list, tuple)) and all(isinstance(label, str) for label in labels)


def _settings(top: dict[str, Any], part: str) -> dict[str, Any]:
    """Returns the input settings under `part`. Raises ConfigError unless each of them is a mapping or null."""
    found = _mapping(top.get(part) or {}, part)
    for name, settings in found.items():
        _mapping(settings or {}, f"{part}.{name}")
    return found


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a mapping, not {type(value).__name__}")
    return value


def _check_keys(given: dict[str, Any], known: Collection[str], needed: Collection[str], where: str = "") -> None:
    """Raises ConfigError for a key that is not `known`, and for a `needed` one that is missing."""
    refuse(
        ConfigError,
        *((key not in known, f"unknown key {where}{key}; known keys: {', '.join(known)}") for key in given),
        *((key not in given, f"the key {where}{key} is missing") for key in needed),
    )


def _build(cls, values: dict[str, Any], where: str):
    known = {f.name: f for f in dataclasses.fields(cls)}
    needed = [name for name, f in known.items() if f.default is dataclasses.MISSING]
    _check_keys(values, known, needed, f"{where}.")
    for key, value in values.items():
        if type(value) not in _TYPES.get(known[key].type, (type(value),)):
            raise ConfigError(f"{where}.{key} must be of type {known[key].type}, not {value!r}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
