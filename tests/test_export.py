"""The graph that is exported for other runtimes gives the engine's results for any batch, length and padding."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from test_checkpoint import LABELS, own_document

from jasper_fast.cli.command import main
from jasper_fast.inference import InferenceEngine, export
from jasper_fast.nn import checkpoint
from jasper_fast.nn.config import JasperConfig
from jasper_fast.nn.eager import EagerJasper
from jasper_fast.nn.model import Jasper

BLOCKS = [
    {"filters": 8, "repeat": 1, "kernel_size": [5], "stride": [2], "residual": False},
    {"filters": 8, "repeat": 2, "kernel_size": [3], "residual": True, "residual_dense": True},
    {"filters": 12, "repeat": 2, "kernel_size": [3], "residual": True, "residual_dense": True},
    {"filters": 12, "repeat": 1, "kernel_size": [7], "residual": True},
    {"filters": 12, "repeat": 1, "kernel_size": [3], "dilation": [2], "residual": False},
]
needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="onnx, onnxscript and onnxruntime are not installed: pip install 'jasper-fast[export]'",
)


def config(masks=True):
    model = {"encoder": {"in_feats": 6, "use_conv_masks": masks, "blocks": BLOCKS}, "decoder": {"in_feats": 12}}
    features = {"filterbank_features": {"n_filt": 6, "convention": "nemo"}}
    return JasperConfig.from_dict({"labels": LABELS, "input_val": features, "jasper": model})


def trained(kind=Jasper, masks=True):
    """Returns a model whose random statistics, gammas and biases make its log-probabilities vary clearly."""
    torch.manual_seed(1)
    model = kind(config(masks))
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1 and tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_mean" not in name else torch.randn_like(tensor))
    return model.eval()


@pytest.mark.parametrize("kind", [Jasper, EagerJasper])
@pytest.mark.parametrize("masks", [True, False])
def test_the_plain_graph_gives_the_engines_numbers(kind, masks):
    model, ours = trained(kind, masks), trained(masks=masks)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = export.PlainJasper(model).eval()
    assert export.differs(plain, InferenceEngine(ours), ours) < 1e-4
    assert plain(torch.randn(1, 6, 40), torch.tensor([40]))[0].std() > 0.3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    wrong = trained(masks=masks)
    wrong.encoder.layers[2].res[0][1].bias.data[0] += 0.1
    assert export.differs(plain, InferenceEngine(wrong), wrong) > 10 * export.TOLERANCE


def test_a_graph_that_forgets_the_padding_is_seen():
    model, plain = trained(), export.PlainJasper(trained(masks=False)).eval()
    assert not export.differs(plain, InferenceEngine(model), model) < 1


@pytest.mark.slow
def test_the_exported_program_serves_other_batches_and_loads_without_this_package(tmp_path):
    model = trained()
    torch.export.save(export.program(model), tmp_path / "jasper.pt2")
    assert export.differs(torch.export.load(tmp_path / "jasper.pt2").module(), InferenceEngine(model), model) < 1e-4
    code = "import sys, torch; m = torch.export.load(sys.argv[1]).module(); x = torch.ones(2, 6, 50)\n"
    code += "m(x[:1, :, :3], torch.tensor([3]))\n"  # the fewest frames that it takes
    code += "print(m(x, torch.tensor([50, 20]))[1].tolist(), 'jasper_fast' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "jasper.pt2")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split("\n")[0] == "[25, 10] False", done.stdout


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_jit_trace():
    model = trained()
    features, lengths = torch.randn(2, 6, 64), torch.tensor([64, 30])
    traced = torch.jit.trace(model, (features, lengths), check_trace=False)
    torch.testing.assert_close(traced(features, lengths), model(features, lengths))


@needs_onnx
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_folder(tmp_path, capsys):
    model = trained()
    path, folder = tmp_path / "a.pt", tmp_path / "new" / "jasper"
    checkpoint.save(path, own_document(model))
    assert main(["export", "onnx", str(path), str(folder)]) == 0
    assert "differ by" in capsys.readouterr().out
    assert sorted(p.name for p in folder.iterdir() if p.suffix != ".data") == [
        "config.json", "features.json", "model.onnx", "vocab.txt",
    ]  # fmt: skip
    assert [p.name for p in folder.parent.iterdir()] == ["jasper"]
    vocabulary = "▁ 0\na 1\nb 2\nc 3\nd 4\ne 5\nf 6\ng 7\n<blk> 8\n"
    assert (folder / "vocab.txt").read_text(encoding="utf-8") == vocabulary
    assert json.loads((folder / "config.json").read_text()) == {
        "model_type": "nemo-conformer-ctc", "features_size": 6, "subsampling_factor": 2,
    }  # fmt: skip
    assert json.loads((folder / "features.json").read_text())["convention"] == "nemo"

    run = export.in_onnx_runtime(folder / "model.onnx")
    for seed in (1, 2):
        assert export.differs(run, InferenceEngine(model), model, seed) < 1e-4
    import onnx

    graph = onnx.load(str(folder / "model.onnx")).graph
    assert [i.name for i in graph.input] == list(export.INPUTS)
    kinds = {node.op_type for node in graph.node}
    assert "BatchNormalization" not in kinds and "Conv" in kinds
    ranks = {len(w.dims) for w in graph.initializer for node in graph.node
             if node.op_type == "Conv" and w.name == node.input[1]}  # fmt: skip
    assert ranks == {4}
    assert main(["export", "onnx", str(path), str(folder)]) == 2
    assert "not an empty folder" in capsys.readouterr().err


@needs_onnx
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_graph_that_differs_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "differs", lambda *_: 0.5)
    with pytest.raises(export.ExportError, match=r"differ by 0\.5"):
        export.export_onnx(trained(), LABELS, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@needs_onnx
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@torch.no_grad()
def test_the_rival_in_onnx_runtime_computes_what_eager_does():
    from jasper_fast.bench.rivals import runtimes

    model = trained(EagerJasper)
    features, lengths = torch.randn(2, 6, 75), torch.tensor([75, 31])
    wanted, frames = model(features, lengths)
    got, found = runtimes.onnx_runtime(model)(features, lengths)
    assert found.tolist() == frames.tolist()
    for i, n in enumerate(frames.tolist()):
        torch.testing.assert_close(got[i, :n], wanted[i, :n], atol=1e-4, rtol=0)


def test_without_the_packages_the_extra_is_named(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.pt"
    checkpoint.save(path, own_document(trained()))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", "onnx", str(path), str(tmp_path / "x")]) == 2
    assert "pip install 'jasper-fast[export]'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
