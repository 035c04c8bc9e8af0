"""Converts checkpoints between formats, with an exact report of what became of each entry."""

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from jasper_fast.inference.recognizer import labels_of
from jasper_fast.nn import nemo_file, tensor_file
from jasper_fast.nn.checkpoint import FORMAT, CheckpointError, first_line, replacing
from jasper_fast.nn.config import JasperConfig
from jasper_fast.nn.formats import NEMO_FEATURES, Weights, read_weights
from jasper_fast.nn.loading import compared, config_of, refuse_misfits
from jasper_fast.nn.model import Jasper
from jasper_fast.speech.features import LogMelFeatures

HOLDS_AVERAGE = ("jasper_fast", "nvidia")
RULES = "they follow other rules for their lengths, for the ends of the audio and for dither"


class ConvertError(ValueError):
    """A conversion is not possible. The message says why and what to do."""


@dataclass
class Report:
    """What became of each entry of a checkpoint; `str(report)` is the text."""

    source: str
    kind: str
    out: str
    to: str
    names: dict[str, str]  # name in `out` of each entry, by its name in `source`
    elements: int
    average: bool  # whether the moving average was converted too
    made: list[str] = field(default_factory=list)  # entries of `out` that are not in `source`
    left_out: list[str] = field(default_factory=list)  # entries of `source` that are not in `out`
    settings_left_out: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        star = lambda name: re.sub(r"\.\d+(?=\.)", ".*", name)  # noqa: E731
        rows = Counter((star(old), star(new)) for old, new in self.names.items())
        wide = max(len(old) for old, _ in rows)
        lines = [
            f"{self.source} ({self.kind}) -> {self.out} ({self.to})",
            *(f"{n:6}  {old:{wide}}  ->  {new}" for (old, new), n in rows.items()),
            f"{len(self.names)} entries, {self.elements:,} elements: read back from the new file, bit-equal",
            *(["the moving average was converted too, as ema_state_dict"] if self.average else []),
        ]
        sections = Counter(name.rpartition(".")[0] or name for name in self.settings_left_out)
        settings = [f"{name} ({n})" for name, n in sections.items()]
        for what, names in (("made anew", self.made), ("left out", self.left_out), ("settings left out", settings)):
            lines += [f"{what}: {', '.join(names)}"] if names else []
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    *,
    config: JasperConfig | None = None,
    ema: bool = False,
    force: bool = False,
) -> tuple[Report, JasperConfig]:
    """Writes the weights in `source`, in any format that `read_weights` knows, to the file `out` in the format `to`.
    Returns the report and the model's configuration.

    Every entry keeps its dtype and bits. The new file is written under a temporary name, read back and compared, and
    then renamed to `out`. `config` is for files without a configuration. With `ema`, the moving average is written in
    place of the weights. Without `ema`, the average is written in addition to the weights if the format has a place for
    it.

    Raises ConvertError if `to` is unknown, if `out` is a folder, if `out` exists and `force` is false, and if the file
    and `config` have different labels. Raises CheckpointError for a file that cannot be read or does not fit its
    configuration. For NeMo's format, raises ValueError if the labels are not known (unless the classes fit the English
    alphabet) or the settings of the features are not valid, and CheckpointError for kernels of even size.
    """
    if to not in WRITERS:
        raise ConvertError(f"--to {to} is unknown; choose one of {', '.join(WRITERS)}")
    refuse_existing(force, out)
    weights = read_weights(source, ema=ema)
    config = _with_labels(config or config_of(weights), weights)
    entries, made = _entries(weights, config)
    average, left_out = None, list(weights.left_out)
    if weights.average is not None and to in HOLDS_AVERAGE:
        average, _ = _entries(dataclasses.replace(weights, state_dict=weights.average), config)
    elif weights.average is not None:
        left_out.append("ema_state_dict (the moving average; --ema writes it in place of the weights)")
    elements = sum(tensor.numel() for tensor in entries.values())
    report = Report(str(source), weights.kind, str(out), to, {}, elements, average is not None, left_out=left_out)
    with replacing(out) as file:
        theirs = WRITERS[to](file, entries, average, config, report)
        file.flush()
        _compare(read_weights(file.name), entries, average, config, to)
    report.names = {weights.names[name]: theirs[name] for name in entries if name in weights.names}
    report.made += [theirs[name] for name in made]
    return report, config


def refuse_existing(force: bool, *paths: str | Path) -> None:
    """Raises ConvertError if one of the files exists and `force` is false, if one is a folder, and if two are the same
    file."""
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise ConvertError(f"each file to write needs its own name, got {', '.join(map(str, paths))}")
    for path in paths:
        if Path(path).is_dir():
            raise ConvertError(f"{path} is a folder; choose the name of a file")
        if Path(path).exists() and not force:
            raise ConvertError(f"{path} exists; choose another name, or add --force to replace it")


def _with_labels(config: JasperConfig, weights: Weights) -> JasperConfig:
    """Returns the configuration, with the labels of the file if it has any."""
    if weights.labels is None:
        return config
    labels = tuple(weights.labels)
    if config.labels is not None and config.labels != labels:
        raise ConvertError(f"{weights.path} has other labels than the configuration")
    return dataclasses.replace(config, labels=labels)


def _entries(weights: Weights, config: JasperConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Returns (entries, made). entries: those of the file in the order of the model, each contiguous and in memory of
    its own. made: the names of entries that the file lacks. These can only be batch counters, which PyTorch before
    0.4.1 did not save."""
    try:
        with torch.device("meta"):
            own = Jasper(config).state_dict()
    except RuntimeError as error:
        raise CheckpointError(
            f"{weights.path}: no model can be made from its configuration ({first_line(error)})"
        ) from error
    given, wrong, extra = compared(own, weights)
    for name in [name for name in own if name not in wrong]:
        tensor = given[name]
        fits = tensor.is_floating_point() == own[name].is_floating_point()
        if not fits or tensor.layout != torch.strided or tensor.is_meta:
            wrong[name] = f"{tensor.dtype} on {tensor.device}, {tensor.layout}"
    refuse_misfits(weights, wrong, extra)
    entries: dict[str, Tensor] = {}
    places: set[int] = set()
    for name in own:
        tensor = given[name].detach()
        storage = tensor.untyped_storage()
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        shared = storage.data_ptr() in places
        entries[name] = tensor if whole and not shared else tensor.clone(memory_format=torch.contiguous_format)
        places.add(storage.data_ptr())
    return entries, [name for name in own if name not in weights.state_dict]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)  # bytes are compared, because a NaN is not equal to itself


def _compare(
    back: Weights, entries: dict[str, Tensor], average: dict[str, Tensor] | None, config: JasperConfig, to: str
) -> None:
    """Raises CheckpointError if the new file, read back, differs from what was to be written."""
    for wanted, got in ((entries, back.state_dict), (average or {}, back.average or {})):
        if wanted.keys() != got.keys():
            raise CheckpointError(f"{back.path} has other entries than were written")
        for name, tensor in wanted.items():
            if tensor.dtype != got[name].dtype or not torch.equal(_bits(tensor), _bits(got[name])):
                raise CheckpointError(f"{back.path}: {name} differs from what was written")
    if to != "nvidia":
        known = JasperConfig.from_dict(back.config)
        same = dataclasses.replace(known.encoder, init=config.encoder.init) == config.encoder
        if not same or known.decoder.n_classes != config.decoder.n_classes:
            raise CheckpointError(f"{back.path}: its configuration is not the one that was written")


def _jasper_fast(
    file: BinaryIO, entries: dict[str, Tensor], average: dict[str, Tensor] | None, config: JasperConfig, report: Report
) -> dict[str, str]:
    state = {"format": FORMAT, "config": config.to_dict(), "labels": _labels(config, report)}
    torch.save(state | {"state_dict": entries, "ema_state_dict": average}, file)
    return {name: name for name in entries}


def _nvidia(
    file: BinaryIO, entries: dict[str, Tensor], average: dict[str, Tensor] | None, config: JasperConfig, report: Report
) -> dict[str, str]:
    quartznet = any(block.separable for block in config.encoder.blocks)  # NVIDIA's QuartzNet names its convs mconv
    theirs = {name: name.replace(".conv.", ".mconv.") if quartznet else name for name in {**entries, **(average or {})}}
    state, mean = ({theirs[k]: v for k, v in of.items()} if of else None for of in (entries, average))
    torch.save({"state_dict": state, "ema_state_dict": mean}, file)
    report.settings_left_out += [*(["labels"] if config.labels else []), "jasper", *_settings(config)]
    report.warnings.append(
        "NVIDIA's format stores neither labels nor settings; to use the file, NVIDIA's scripts and jasper-fast need a "
        "configuration, which --config-out writes"
    )
    if config.filterbank.get("convention", "reference") != "reference":
        report.warnings.append(f"the model was trained on NeMo's features; NVIDIA's differ: {RULES}")
    return theirs


def _nemo(
    file: BinaryIO, entries: dict[str, Tensor], average: dict[str, Tensor] | None, config: JasperConfig, report: Report
) -> dict[str, str]:
    if config.labels is None:
        report.warnings.append("the source does not name its labels; the published ones are used: space, a to z, '")
    given = {"n_filt": config.encoder.in_feats} | config.filterbank
    try:
        features = LogMelFeatures.from_config(given, pad_to_max_duration=False)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ConvertError(f"{report.source}: the settings of its features are not valid ({error})") from error
    settings = dict(NEMO_FEATURES.values()) | given
    settings["log_zero_guard_value"] = features.log_guard
    settings["pad_align"] = settings["pad_align"] or 0
    if features.convention != "nemo":
        report.warnings.append(f"the model was trained on NVIDIA's features; NeMo's differ: {RULES}")
    theirs = nemo_file.names(entries, config.encoder.use_conv_masks)
    made = {"preprocessor.featurizer.window": features.window, "preprocessor.featurizer.fb": features.mel[None]}
    document = nemo_file.document(config, labels_of(config), settings)
    nemo_file.write(file, document, made | {theirs[name]: tensor for name, tensor in entries.items()})
    report.made += made
    kept = {f"filterbank_features.{ours}": settings[ours] for ours, _ in NEMO_FEATURES.values()}
    kept |= {"audio_dataset.sample_rate": settings["sample_rate"], "filterbank_features.convention": "nemo"}
    report.settings_left_out += (
        name for name, value in _settings(config).items() if kept.get(name.partition(".")[2], {}) != value
    )
    return theirs


def _safetensors(
    file: BinaryIO, entries: dict[str, Tensor], average: dict[str, Tensor] | None, config: JasperConfig, report: Report
) -> dict[str, str]:
    tensor_file.write(file, entries, config.to_dict(), _labels(config, report))
    return {name: name for name in entries}


WRITERS = {"jasper_fast": _jasper_fast, "nvidia": _nvidia, "nemo": _nemo, "safetensors": _safetensors}


def _labels(config: JasperConfig, report: Report) -> list[str] | None:
    if config.labels is None:
        report.warnings.append("the labels are not known; give a configuration with labels as --config")
    if not config.filterbank:
        report.warnings.append("the settings of the features are not known; NVIDIA's are assumed")
    return list(config.labels) if config.labels is not None else None


def _settings(config: JasperConfig) -> dict[str, Any]:
    """Returns all settings in `input_val` and `input_train`, by dotted names."""
    return _leaves(config.input_val, "input_val") | _leaves(config.input_train, "input_train")


def _leaves(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {dotted: leaf for key, inner in value.items() for dotted, leaf in _leaves(inner, f"{name}.{key}").items()}


def yaml_of(config: JasperConfig) -> str:
    """Returns the configuration as YAML text in the form of NVIDIA's files."""
    import yaml

    document = config.to_dict()
    if config.labels is not None:  # n_classes follows from the labels, so NVIDIA's files do not have it
        del document["jasper"]["decoder"]["n_classes"]
    return yaml.safe_dump({k: v for k, v in document.items() if v}, sort_keys=False, allow_unicode=True)
