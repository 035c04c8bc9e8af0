"""Weights as a `.nemo` archive: a tar with NeMo's configuration, and with the weights under NeMo's names."""

import io
import tarfile
import tempfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor

from jasper_fast.nn.checkpoint import CheckpointError
from jasper_fast.nn.config import JasperConfig, as_dict
from jasper_fast.nn.formats import NEMO_FEATURES, NEMO_TARGET, renamed

_MODULES = "nemo.collections.asr.modules"
_RULES = (
    (r"^encoder\.layers\.", "encoder.encoder."),
    (r"^decoder\.layers\.", "decoder.decoder_layers."),
    (r"^(encoder\.encoder\.\d+)\.conv\.", r"\1.mconv."),
)


def names(entries: dict[str, Tensor], masked: bool) -> dict[str, str]:
    """Returns NeMo's name of each of this project's `entries`. `masked`: whether the convs have masks; NeMo wraps
    such convs."""
    found = {}
    for name, tensor in entries.items():
        theirs = renamed(name, _RULES)
        if masked and name.startswith("encoder.") and tensor.dim() == 3:
            theirs = theirs.removesuffix("weight") + "conv.weight"
        found[name] = theirs
    return found


def document(config: JasperConfig, labels: Sequence[str], features: dict[str, Any]) -> dict[str, Any]:
    """Returns NeMo's `model_config.yaml`. `features`: all settings of `filterbank_features` that NeMo has too.

    Raises CheckpointError for an even kernel, because NeMo pads it differently.
    """
    blocks = []
    for i, block in enumerate(config.encoder.blocks):
        if block.k % 2 == 0:
            raise CheckpointError(f"block {i} has the even kernel {block.k}, which NeMo pads differently")
        theirs = as_dict(block)
        blocks.append({"kernel": theirs.pop("kernel_size")} | theirs)
    front = {theirs: features[ours] for theirs, (ours, _) in NEMO_FEATURES.items()}
    encoder, decoder = config.encoder, config.decoder
    return {
        "target": "nemo.collections.asr.models.ctc_models.EncDecCTCModel",
        "sample_rate": front["sample_rate"],
        "labels": list(labels),
        "preprocessor": {"_target_": f"{_MODULES}.{NEMO_TARGET}"} | front,
        "encoder": {
            "_target_": f"{_MODULES}.ConvASREncoder", "feat_in": encoder.in_feats, "activation": encoder.activation,
            "conv_mask": encoder.use_conv_masks, "init_mode": encoder.init, "jasper": blocks,
        },
        "decoder": {
            "_target_": f"{_MODULES}.ConvASRDecoder", "feat_in": decoder.in_feats, "num_classes": len(labels),
            "vocabulary": list(labels), "init_mode": decoder.init,
        },
    }  # fmt: skip


def write(file: BinaryIO, document: dict[str, Any], entries: dict[str, Tensor]) -> None:
    """Writes the archive, uncompressed as NeMo does. Equal contents give equal bytes."""
    import yaml

    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode()
    with tarfile.open(fileobj=file, mode="w") as archive, tempfile.TemporaryFile() as weights:
        torch.save(entries, weights)
        for name, part in (("model_config.yaml", io.BytesIO(text)), ("model_weights.ckpt", weights)):
            member = tarfile.TarInfo(f"./{name}")
            member.size = part.seek(0, io.SEEK_END)
            part.seek(0)
            archive.addfile(member, part)
