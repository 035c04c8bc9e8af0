"""The command `jasper-fast convert`: what it writes, and its one-line errors for damaged or malicious files."""
# ruff: noqa: F811 (fixtures)

import io
import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from nemo_files import saved, tarred, untarred
from test_checkpoint import BLOCKS, LABELS, Bomb, config, own_document
from test_convert import TARGETS, full_config, model, own  # noqa: F401 (fixtures)

from jasper_fast.cli import command
from jasper_fast.inference.convert import ConvertError, convert
from jasper_fast.nn import checkpoint
from jasper_fast.nn.checkpoint import FORMAT, CheckpointError
from jasper_fast.nn.config import JasperConfig
from jasper_fast.nn.formats import read_weights

# --- the command -------------------------------------------------------------------------------------------------


def run(capsys, *argv) -> tuple[int, str, str]:
    status = command.main(["convert", *map(str, argv)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command(tmp_path, own, capsys):
    out, settings, data = tmp_path / "a.pt", tmp_path / "a.yaml", tmp_path / "a.json"
    argv = (own, out, "--to", "nvidia", "--config-out", settings, "--report", data)
    status, said, errors = run(capsys, *argv)
    assert status == 0 and not errors and "encoder.layers.*.conv.*.weight" in said
    assert json.loads(data.read_text())["names"].keys() == torch.load(own, weights_only=True)["state_dict"].keys()
    assert JasperConfig.from_yaml(settings) == full_config()
    status, _, errors = run(capsys, out, tmp_path / "b.nemo", "--to", "nemo", "--config", settings)
    assert status == 0 and not errors
    for missing in (out, settings, data):  # the two other files exist
        missing.rename(tmp_path / "kept")
        status, _, errors = run(capsys, *argv)
        assert status == 2 and errors.count("\n") == 1 and "exists; choose another name, or add --force" in errors
        assert not missing.exists()
        (tmp_path / "kept").rename(missing)
    assert run(capsys, *argv, "--force")[0] == 0
    new, beside = tmp_path / "new.pt", tmp_path / "folder" / ".." / "new.pt"
    for option in ("--config-out", "--report"):
        status, _, errors = run(capsys, own, new, "--to", "nvidia", option, beside, "--force")
        assert status == 2 and "each file to write needs its own name" in errors and not new.exists()
    status, _, errors = run(capsys, own, tmp_path, "--to", "nvidia", "--force")
    assert status == 2 and "is a folder; choose the name of a file" in errors
    before = out.read_bytes()
    assert run(capsys, out, out, "--to", "jasper_fast", "--config", settings, "--force")[0] == 0
    assert out.read_bytes() != before and read_weights(out).kind == "jasper_fast"


def headed(content: bytes, change) -> bytes:
    """Returns a safetensors file whose header is changed by `change`."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    text = json.dumps(change(header) or header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def with_bias(**changes):
    """Returns a function that changes the entry of the decoder's bias in a safetensors header."""
    return lambda header: header["decoder.layers.0.bias"].update(changes)


def settings_that_lie(header):
    about = json.loads(header["__metadata__"]["jasper_fast"])
    about["config"]["jasper"]["encoder"]["blocks"][1]["repeat"] = 10**9
    header["__metadata__"]["jasper_fast"] = json.dumps(about)


def rezipped(content: bytes) -> bytes:
    """Returns a checkpoint in which a tensor claims more elements than its record contains."""
    file, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(content))
    with zipfile.ZipFile(file, "w") as out:
        for name in source.namelist():
            data = source.read(name)
            out.writestr(name, data[:-8] if name.endswith("data/0") else data)
    return file.getvalue()


def hostile(forms: dict[str, bytes], trap: Path) -> dict[str, bytes]:
    """Returns a hostile file of each kind. `trap`: the folder that code in a file would make if it ran."""
    pickled, archive, tensors = forms["nvidia"], untarred(forms["nemo"]), forms["safetensors"]
    evil = saved({"state_dict": {"encoder.layers.0.conv.0.weight": Bomb(trap)}})
    yaml_bomb = b"a: !!python/object/apply:os.mkdir [" + str(trap).encode() + b"]\n"
    endless = b"encoder: &a [*a]\n"
    laughs = b"a0: &a0 [x]\n"
    for i in range(30):
        laughs += b"a%d: &a%d [%s]\n" % (i + 1, i + 1, b",".join([b"*a%d" % i] * 9))
    references = b"a0: [x]\n" + b"".join(b"a%d: ['${a%d}', '${a%d}']\n" % (i + 1, i, i) for i in range(60))
    whole = torch.load(io.BytesIO(forms["jasper_fast"]), weights_only=True)
    deep: list = ["x"]
    own: dict = {}
    own["cfg"] = own
    for _ in range(40):
        deep = [deep, deep]
    config, weights = "./model_config.yaml", "./model_weights.ckpt"
    return {
        "pickle with a payload": evil,
        "truncated zip": pickled[: len(pickled) // 2],
        "record cut short": rezipped(pickled),
        "empty": b"",
        "truncated tar": forms["nemo"][: len(forms["nemo"]) // 2],
        "tar with a payload": tarred(archive | {weights: evil}),
        "tar with a yaml payload": tarred(archive | {config: yaml_bomb}),
        "tar with an endless yaml": tarred(archive | {config: endless}),
        "tar with a yaml of lists of lists": tarred(archive | {config: laughs}),
        "tar with a yaml of references to references": tarred(archive | {config: references}),
        "tar with a path outside": tarred(archive | {"../model_weights.ckpt": archive[weights]}),
        "tar with an absolute path": tarred(archive | {"/tmp/model_config.yaml": archive[config]}),
        "tar of something else": tarred({"a.txt": b"x"}),
        "tar with a truncated checkpoint": tarred(archive | {weights: archive[weights][:-100]}),
        "tar with a list": tarred(archive | {weights: saved([1])}),
        "tar with a text for a configuration": tarred(archive | {config: b"hello"}),
        "truncated safetensors": tensors[:-10],
        "safetensors with a length beyond the file": struct.pack("<Q", 2**62) + tensors[8:],
        "safetensors with a shape that lies": headed(tensors, with_bias(shape=[10**12])),
        "safetensors with offsets beyond the file": headed(tensors, with_bias(data_offsets=[4, 10**9])),
        "safetensors with tensors that overlap": headed(tensors, with_bias(data_offsets=[0, 36])),
        "safetensors with a configuration that lies": headed(tensors, settings_that_lie),
        "wrong types": saved({"format": FORMAT, "state_dict": {"a": 1}}),
        "labels of a wrong type": saved({"format": FORMAT, "state_dict": {"a": torch.ones(1)}, "labels": 5}),
        "configuration with a tensor": saved(
            {"format": FORMAT, "state_dict": {"a": torch.ones(1)}, "config": {"encoder": torch.ones(1)}}
        ),
        "configuration of lists of lists": saved(whole | {"config": whole["config"] | {"input_val": {"a": deep}}}),
        "settings that contain themselves": saved({"state_dict": {"a": torch.ones(1)}, "hyper_parameters": own}),
        "counters for weights": saved(
            whole | {"state_dict": whole["state_dict"] | {"decoder.layers.0.bias": torch.ones(9).int()}}
        ),
    }  # fmt: skip


HOSTILE = (
    "pickle with a payload", "truncated zip", "record cut short", "empty", "truncated tar", "tar with a payload",
    "tar with a yaml payload", "tar with an endless yaml", "tar with a path outside", "tar with an absolute path",
    "tar of something else", "tar with a truncated checkpoint", "tar with a list",
    "tar with a text for a configuration", "truncated safetensors", "safetensors with a length beyond the file",
    "safetensors with a shape that lies", "safetensors with offsets beyond the file",
    "safetensors with tensors that overlap", "safetensors with a configuration that lies", "wrong types",
    "labels of a wrong type", "configuration with a tensor", "counters for weights",
    "tar with a yaml of lists of lists", "tar with a yaml of references to references",
    "configuration of lists of lists", "settings that contain themselves",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory, model) -> tuple[dict[str, bytes], Path]:
    """Returns the hostile files by kind, and the folder that code in a file would make if it ran."""
    folder = tmp_path_factory.mktemp("forms")
    checkpoint.save(folder / "in.pt", own_document(model, config=full_config().to_dict()))
    found = {}
    for to in TARGETS:
        convert(folder / "in.pt", folder / to, to)
        found[to] = (folder / to).read_bytes()
    contents = hostile(found, folder / "trap")
    assert contents.keys() == set(HOSTILE)
    return contents, folder / "trap"


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(tmp_path, files, capsys, kind):
    path, (contents, trap) = tmp_path / "in.bin", files
    path.write_bytes(contents[kind])
    status, said, errors = run(capsys, path, tmp_path / "out.pt", "--to", "jasper_fast")
    assert status == 2 and not said
    assert errors.count("\n") == 1 and errors.startswith(f"jasper-fast convert: error: {path}"), errors
    assert len(errors) < 700 and os.listdir(tmp_path) == ["in.bin"] and not trap.exists()


def test_an_even_kernel_is_not_nemos(tmp_path, model):
    blocks = [{**b, "kernel_size": [4]} if i == 3 else b for i, b in enumerate(BLOCKS)]
    jasper = {"encoder": {"in_feats": 6, "blocks": blocks}, "decoder": {"in_feats": 12}}
    state = model.state_dict() | {"encoder.layers.3.conv.0.weight": torch.ones(12, 8, 4)}
    document = own_document(model, config={"labels": LABELS, "jasper": jasper}, state_dict=state)
    checkpoint.save(tmp_path / "a.pt", document)
    with pytest.raises(CheckpointError, match="block 3 has the even kernel 4"):
        convert(tmp_path / "a.pt", tmp_path / "a.nemo", "nemo")
    assert os.listdir(tmp_path) == ["a.pt"]
    convert(tmp_path / "a.pt", tmp_path / "b.pt", "safetensors")


def test_other_labels_than_the_configurations_are_refused(tmp_path, own):
    with pytest.raises(ConvertError, match="other labels"):
        convert(own, tmp_path / "a", "nemo", config=config(list("hgfedcba")))
