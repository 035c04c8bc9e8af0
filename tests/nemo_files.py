"""Files as NeMo writes them, for the tests of loading and converting: archives, and pairs of files."""

import io
import tarfile
from pathlib import Path

import corpora
import torch
import yaml
from torch import Tensor, nn


def saved(state: object) -> bytes:
    """Returns the bytes of a file that torch.save writes."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def tarred(members: dict[str, bytes], compression: str = "") -> bytes:
    """Returns the bytes of a tar archive with these members. `compression`: "" or "gz"."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=f"w:{compression}") as archive:
        for name, content in members.items():
            corpora.add(archive, name, content)
    return file.getvalue()


def entries(model: nn.Module, masked: bool = True) -> dict[str, Tensor]:
    """Returns the state dict under NeMo's names. `masked`: the convs have masks, so NeMo wraps them."""
    found = {}
    for name, tensor in model.state_dict().items():
        new = (
            name.replace("decoder.layers", "decoder.decoder_layers")
            .replace("encoder.layers", "encoder.encoder")
            .replace(".conv.", ".mconv.")
        )
        wrapped = masked and new.startswith("encoder.") and tensor.dim() == 3
        found[new.removesuffix("weight") + "conv.weight" if wrapped else new] = tensor
    return found


def write(path: Path, document: dict, state: dict[str, Tensor], compression: str = "") -> None:
    """Writes an archive of this configuration and these entries."""
    members = {"./model_config.yaml": yaml.safe_dump(document).encode(), "./model_weights.ckpt": saved(state)}
    path.write_bytes(tarred(members, compression))


def untarred(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Returns the configuration and the entries in an archive."""
    members = untarred(path.read_bytes())
    return (
        yaml.safe_load(members["./model_config.yaml"]),
        torch.load(io.BytesIO(members["./model_weights.ckpt"]), weights_only=True),
    )


def write_halves(folder: Path, model: nn.Module) -> tuple[Path, Path]:
    """Writes the two files that NeMo 0.x makes of a model; returns the paths of encoder and decoder."""
    paths = folder / "JasperEncoder-STEP-100.pt", folder / "JasperDecoderForCTC-STEP-100.pt"
    for path, part in zip(paths, ("encoder.", "decoder."), strict=True):
        torch.save({k.removeprefix(part): v for k, v in entries(model).items() if k.startswith(part)}, path)
    return paths
