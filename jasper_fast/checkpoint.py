"""Checkpoints: atomic writes, safe reads, rotation, and the weights of other Jasper implementations."""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import shutil
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jasper_fast.config import JasperConfig
    from jasper_fast.model import Jasper

__all__ = [
    "FORMAT",
    "CheckpointError",
    "Folder",
    "Weights",
    "load",
    "load_model",
    "load_weights",
    "read_weights",
    "save",
]

FORMAT = "jasper_fast 1"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message names the file and what to do."""


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Writes `state` so that `path` holds either what it held before or all of `state`, whatever happens meanwhile.

    `state`: tensors and plain Python values. The bytes go to a temporary file beside `path`, to the disk (fsync), and
    only then take the name. Raises CheckpointError, with the old file untouched, if they cannot be written (disk full).
    Equivalent to `torch.save(state, path)` where nothing fails.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name itself must reach the disk too
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        if temporary.exists():
            temporary.unlink()
        if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
            error = error.__context__  # PyTorch's writer hides what the disk said
        free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0
        kept = f"; the earlier {path.name} is untouched" if path.exists() else ""
        raise CheckpointError(
            f"cannot write {path}: {error} ({free:.0f} MiB free on that disk){kept}. Free some space, or choose "
            f"another folder or a smaller number of kept checkpoints"
        ) from error


def load(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """The dictionary in a PyTorch checkpoint file, tensors only: nothing in the file is ever executed.

    Checks the checksum of every record, so that a damaged file is noticed before it is used. Raises CheckpointError
    naming the file and what to do. Equivalent to `torch.load(path, map_location, weights_only=True)`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the path of a checkpoint (.pt) or of a NeMo model (.nemo)")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise CheckpointError(f"{path} is damaged (record {bad}); take an earlier checkpoint")
        state = torch.load(path, map_location=map_location, weights_only=True)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # bytes that are no checkpoint make the unpickler fail in any way
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path} holds Python objects ({found[1]}) and is not loaded, because loading "
                f"them could run anything; save it again, where it was made, as torch.save({{'state_dict': "
                f"model.state_dict()}}, ...)"
            ) from error
        raise CheckpointError(
            f"{path} is not a complete PyTorch checkpoint ({path.stat().st_size} bytes): it was cut short, or is "
            f"another kind of file; copy it again or take an earlier checkpoint"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a dictionary with a 'state_dict'")
    return state


class Folder:
    """The checkpoints of one training run: the last `keep`, `best.pt`, and one per epoch in `milestones`.

    Raises ValueError if `keep` is less than 1.
    """

    def __init__(self, path: str | Path, keep: int = 2, milestones: Sequence[int] = ()):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}: resuming needs a checkpoint")
        self.path, self.keep, self.milestones = Path(path), keep, frozenset(milestones)

    def save(self, state: dict[str, Any]) -> Path:
        """Writes `state` under its `step`, then removes what is older than the last `keep`; raises CheckpointError."""
        path = self.path / f"step_{state['step']:08d}.pt"
        save(path, state)
        for old in self.steps()[: -self.keep]:
            old.unlink()
        return path

    def save_milestone(self, state: dict[str, Any], epoch: int) -> Path | None:
        """Writes `state` for good if `epoch` is a milestone."""
        if epoch not in self.milestones:
            return None
        save(path := self.path / f"milestone_epoch_{epoch:04d}.pt", state)
        return path

    def save_best(self, state: dict[str, Any]) -> Path:
        """Writes `state`, whose `best_wer` is its own, as `best.pt`."""
        save(path := self.path / "best.pt", state)
        return path

    def steps(self) -> list[Path]:
        """The rotating checkpoints, oldest first."""
        return sorted(self.path.glob("step_*.pt"), key=lambda p: int(p.stem.removeprefix("step_")))

    def clean(self) -> None:
        """Removes what a process killed in the middle of a write has left."""
        for leftover in self.path.glob(".*.pt.tmp"):
            leftover.unlink()

    def latest(self, report: Callable[[str], None] = warnings.warn) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint that can be read, with its contents; None if there is none at all.

        Each file that cannot be read is reported, and the one before it taken; raises CheckpointError if none can.
        """
        others = [p for p in (*sorted(self.path.glob("milestone_*.pt"))[::-1], self.path / "best.pt") if p.exists()]
        candidates = [*self.steps()[::-1], *others]
        for path in candidates:
            try:
                state = load(path)
                if state.get("format") != FORMAT:
                    raise CheckpointError(f"{path} was not written by this project's training")
                return path, state
            except CheckpointError as error:
                report(f"{error}; trying the one before it")
        if candidates:
            raise CheckpointError(
                f"none of the {len(candidates)} checkpoints in {self.path} can be read; empty the folder to start anew"
            )
        return None


def rng_state() -> dict[str, Any]:
    """The state of every random generator of this process: torch, each CUDA device, Python, NumPy; tensors and ints."""
    import numpy as np

    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts every random generator where `rng_state` found it."""
    import numpy as np

    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))


@dataclass
class Weights:
    """Weights under this project's names, with what their file says about the model; `kind` is the file's layout."""

    path: Path
    kind: str
    state_dict: dict[str, Tensor]
    config: dict[str, Any] | None = None
    labels: list[str] | None = None


def read_weights(path: str | Path, *, ema: bool = False) -> Weights:
    """The weights in a file of any known layout; `ema` asks for the moving average.

    Reads this project's checkpoints, NVIDIA's Jasper for PyTorch of 2021 and later (`encoder.layers.*`) and of 2019 and
    2020 (`jasper_encoder.encoder.*`), bare state dicts of those, and NeMo's `.nemo` archives, compressed or not.
    Raises CheckpointError naming the file for anything else, and where the moving average is asked for and absent.
    """
    path = Path(path)
    if path.is_file() and tarfile.is_tarfile(path):  # asked first: a tar that ends in a zip passes for a zip
        if ema:
            raise CheckpointError(f"{path}: a NeMo archive carries no moving average; load it without ema")
        return _read_nemo(path)
    state = load(path)
    key = "ema_state_dict" if ema else "state_dict"
    if ema and not state.get(key):
        raise CheckpointError(f"{path} carries no moving average (ema_state_dict); load it without ema")
    entries = state.get(key, state)
    if not isinstance(entries, dict) or not all(isinstance(v, Tensor) for v in entries.values()):
        raise CheckpointError(f"{path} holds no model: there is no 'state_dict' among {', '.join(map(str, state))}")
    entries = {name.removeprefix("module."): tensor for name, tensor in entries.items()}
    kind = "jasper_fast" if state.get("format") == FORMAT else "reference v2"
    if any(name.startswith("jasper_encoder.") for name in entries):
        kind, entries = "reference v1", _rename(entries, _V1, drop=("acoustic_model.", "audio_preprocessor."))
    elif any(name.startswith("encoder.encoder.") for name in entries):
        kind, entries = "NeMo", _rename(entries, _NEMO, drop=("preproc", "spec_aug"))
    config = state.get("config") if kind == "jasper_fast" else None
    return Weights(path, kind, entries, config, state.get("labels") if kind == "jasper_fast" else None)


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
    from jasper_fast.config import JasperConfig
    from jasper_fast.model import Jasper

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


def jasper10x5dr(n_classes: int = 29) -> dict[str, Any]:
    """The published dense-residual Jasper 10x5 (332,632,349 parameters at 29 classes), as a dictionary."""

    def block(filters: int, kernel: int, dropout: float, repeat: int = 1, stride: int = 1, dilation: int = 1) -> dict:
        dense = repeat > 1
        return {
            "filters": filters, "repeat": repeat, "kernel_size": [kernel], "stride": [stride], "dilation": [dilation],
            "dropout": dropout, "residual": dense, "residual_dense": dense,
        }  # fmt: skip

    table = ((256, 11, 0.2), (384, 13, 0.2), (512, 17, 0.2), (640, 21, 0.3), (768, 25, 0.3))
    blocks = [block(256, 11, 0.2, stride=2)]
    blocks += [block(*row, repeat=5) for row in table for _ in range(2)]
    blocks += [block(896, 29, 0.4, dilation=2), block(1024, 1, 0.4)]
    encoder = {"in_feats": 64, "activation": "relu", "use_conv_masks": True, "blocks": blocks}
    return {"encoder": encoder, "decoder": {"in_feats": 1024, "n_classes": n_classes}}


_V1 = ((r"^jasper_encoder\.encoder\.", "encoder.layers."), (r"^jasper_decoder\.decoder_layers\.", "decoder.layers."))
_NEMO = (
    (r"^encoder\.encoder\.", "encoder.layers."),
    (r"^decoder\.decoder_layers\.", "decoder.layers."),
    (r"\.mconv\.", ".conv."),
    (r"^(encoder\..*\.\d+)\.conv\.weight$", r"\1.weight"),  # the convolution inside a masked one
)


def _rename(entries: dict[str, Tensor], rules: Sequence[tuple[str, str]], drop: Sequence[str]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in entries.items():
        if any(part in name for part in drop):
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _read_nemo(path: Path) -> Weights:
    """A `.nemo` archive, read in memory: `model_config.yaml` and `model_weights.ckpt`."""
    import yaml

    members: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and name in ("model_config.yaml", "model_weights.ckpt"):
                    members[name] = archive.extractfile(member).read()
        if len(members) < 2:
            raise CheckpointError(
                f"{path} is a tar archive without model_config.yaml and model_weights.ckpt: not NeMo's"
            )
        document = yaml.safe_load(members["model_config.yaml"])
        entries = torch.load(io.BytesIO(members["model_weights.ckpt"]), map_location="cpu", weights_only=True)
        config = _nemo_config(document)
    except (tarfile.TarError, EOFError, OSError, RuntimeError, pickle.UnpicklingError, yaml.YAMLError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a complete NeMo archive ({error}); copy or download it again") from error
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its model_config.yaml is not that of a Jasper (at {error})") from error
    entries = _rename(entries, _NEMO, drop=("preproc", "spec_aug"))
    return Weights(path, "NeMo", entries, config, config["labels"])


def _nemo_config(document: dict[str, Any]) -> dict[str, Any]:
    """NeMo's model configuration in this project's terms; raises CheckpointError for blocks that no Jasper has."""
    document = _resolved(document, document)
    encoder, decoder = document["encoder"], document["decoder"]
    labels = list(decoder.get("vocabulary") or document.get("labels") or ()) or None
    blocks = []
    for i, block in enumerate(encoder["jasper"]):
        foreign = [k for k in ("separable", "se", "stride_last") if block.get(k)]
        foreign += [k for k, usual in (("groups", 1), ("heads", -1), ("norm", "batch")) if block.get(k, usual) != usual]
        if foreign:
            raise CheckpointError(
                f"block {i} of the NeMo model has {foreign[0]}={block[foreign[0]]}: it is not a Jasper (QuartzNet and "
                f"Citrinet are other models)"
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
            }
        )  # fmt: skip
    n_classes = decoder.get("num_classes", -1)
    n_classes = len(labels) if labels and (n_classes is None or n_classes < 1) else n_classes
    front = document.get("preprocessor", {})
    features = {
        "sample_rate": front.get("sample_rate", 16000), "window_size": front.get("window_size", 0.02),
        "window_stride": front.get("window_stride", 0.01), "window": front.get("window", "hann"),
        "n_filt": front.get("features", 64), "n_fft": front.get("n_fft") or 512, "normalize": "per_feature",
        "frame_splicing": front.get("frame_splicing", 1), "dither": 0.0, "pad_align": front.get("pad_to", 16) or 1,
    }  # fmt: skip
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


def _one(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def _resolved(value: Any, root: dict[str, Any]) -> Any:
    """`value` with every `${a.b}` replaced by what stands there under `root` (which is also called `model`)."""
    if isinstance(value, dict):
        return {k: _resolved(v, root) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolved(v, root) for v in value]
    if isinstance(value, str) and (match := re.fullmatch(r"\$\{([\w.]+)\}", value)):
        found: Any = root
        for part in match[1].removeprefix("model.").split("."):
            found = found[part]
        return _resolved(found, root)
    return value
