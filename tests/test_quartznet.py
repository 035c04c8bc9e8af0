"""QuartzNet: separable blocks in the model, the engine, the exported graph and NeMo's archives."""

import itertools
from pathlib import Path

import engines
import nemo_files
import pytest
import torch
from close import assert_close
from conftest import make_face, settle
from engines import block, pair, poison, valid
from test_checkpoint import same
from test_modules import refused

from jasper_fast import InferenceEngine, Jasper, JasperConfig
from jasper_fast.inference import export
from jasper_fast.nn.eager import EagerJasper
from jasper_fast.nn.loading import load_model

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FEATS, CLASSES = 8, 7
# like QuartzNet 15x5: a prologue of stride 2, plain residuals, an epilogue with dilation, a pointwise conv
BLOCKS = [
    block(16, k=9, s=2) | {"separable": True},
    block(16, 3, 7, residual=True, dropout=0.0) | {"separable": True},
    block(24, 2, 11, residual=True) | {"separable": True},
    block(24, k=13, d=2) | {"separable": True},
    block(16, k=1),
]


def config(masks: bool = True, blocks: list | None = None) -> JasperConfig:
    return engines.config(blocks or BLOCKS, masks)


def batch(masks: bool, device: torch.device | str = "cpu"):
    return engines.batch([41, 17, 1] if masks else [41, 41, 41], device=device)


# small, because Triton's interpreter takes a millisecond for each tap of each program
SMALL = [block(16, k=3, s=2) | {"separable": True}, block(16, 2, 3, residual=True) | {"separable": True}]


def test_quartznet_15x5_has_the_published_size() -> None:
    with torch.device("meta"):
        model = Jasper(JasperConfig.from_yaml(CONFIGS / "quartznet15x5.yaml"))
    assert sum(p.numel() for p in model.parameters()) == 18_924_381
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    # NeMo's order of modules: depthwise, pointwise, batch norm, ReLU, dropout
    assert shapes["encoder.layers.7.conv.5.weight"] == (512, 1, 51)
    assert shapes["encoder.layers.7.conv.6.weight"] == (512, 512, 1)
    assert shapes["encoder.layers.7.conv.7.running_mean"] == (512,)
    assert shapes["encoder.layers.7.res.0.0.weight"] == (512, 256, 1)


@pytest.mark.slow
def test_triton_equals_eager() -> None:
    face = make_face("triton")
    assert_evaluates(config(blocks=SMALL), True, face)
    assert_trains(config(blocks=SMALL), True, face)


def assert_evaluates(cfg: JasperConfig, masks: bool, face) -> None:
    eager, ours = pair(cfg, face.name, face.device)
    features, lengths = batch(masks, face.device)
    with torch.no_grad():
        low, want_lengths = eager(features, lengths)
        ref, _ = eager.double()(features.double(), lengths)
        engine = InferenceEngine(ours)
        for run, garbage in itertools.product((ours, engine), (0.0, torch.nan)):
            poison(engine)
            padding = (torch.arange(41, device=face.device) >= lengths[:, None])[:, None]
            got, got_lengths = run(features.masked_fill(padding, garbage), lengths)
            assert torch.equal(got_lengths, want_lengths)
            assert_close("log_probs", *(valid(x, want_lengths) for x in (got, low, ref)), 4.0)
            assert got.isfinite().all()


def assert_trains(cfg: JasperConfig, masks: bool, face) -> None:
    eager, ours = pair(cfg, settle(face.name), face.device)
    features, lengths = batch(masks, face.device)
    up, results = torch.randn(3, 21, CLASSES), []
    wide = EagerJasper(cfg).to(face.device)
    wide.load_state_dict(eager.state_dict())
    for model, dtype in ((ours, None), (eager, None), (wide.double(), torch.float64)):
        log_probs, out = model.train()(features.to(dtype), lengths)
        valid(log_probs * up[:, : log_probs.shape[1]], out).sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
        results[-1] |= {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    got, low, ref = results
    for name in ref:
        assert_close(name, got[name], low[name], ref[name].to(torch.float64), 6.0)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("face", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("compare", [assert_evaluates, assert_trains])
def test_evaluation_the_engine_and_a_training_step_equal_eager(compare, masks: bool, face) -> None:
    compare(config(masks), masks, face)


def test_backward_keeps_less_than_half_of_eagers_bytes() -> None:
    eager, ours = pair(config(), settle("cpu"))
    features, lengths = batch(True)
    kept = []
    for model in (eager.train(), ours.train()):
        held, own = [], {p.data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, held=held: held.append(t) or t, lambda t: t):
            model(features, lengths)
        storages = [t.untyped_storage() for t in held if t.data_ptr() not in own]
        kept.append(sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
    assert kept[1] <= 0.5 * kept[0]


def test_strides_and_even_kernels_in_the_engine() -> None:
    blocks = [
        block(16, 2, 5, s=2) | {"separable": True},
        block(12, k=4) | {"separable": True},
        block(16, k=3, residual=True, dense=True) | {"separable": True},
        block(20, 2, k=1, residual=True, dense=True) | {"separable": True},
    ]
    assert_evaluates(config(blocks=blocks), True, make_face("cpu"))


@pytest.mark.parametrize("kind", [Jasper, EagerJasper])
def test_the_plain_graph_is_the_engine(kind) -> None:
    eager, ours = pair(config(), settle("cpu"))
    plain = export.PlainJasper({Jasper: ours, EagerJasper: eager}[kind])
    assert export.differs(plain, InferenceEngine(ours), ours) < 1e-4


def test_a_hook_on_a_depthwise_conv_is_refused() -> None:
    _, ours = pair(config(), settle("cpu"))
    ours.encoder.layers[0].conv["0"].register_forward_hook(print)
    refused(ours, r"a hook \(print\)")


def test_nemos_archive_of_a_quartznet_loads(tmp_path) -> None:
    _, ours = pair(config(), settle("cpu"))
    document = {
        "preprocessor": {"sample_rate": 16000, "features": FEATS, "n_fft": 512},
        "encoder": {"feat_in": FEATS, "jasper": [{k.removesuffix("_size"): v for k, v in b.items()} for b in BLOCKS]},
        "decoder": {"feat_in": 16, "num_classes": CLASSES - 1, "vocabulary": list("abcdef")},
    }
    nemo_files.write(tmp_path / "q.nemo", document, nemo_files.entries(ours))
    loaded = load_model(tmp_path / "q.nemo")
    assert loaded.config.encoder.blocks[0].separable
    assert same(loaded.state_dict(), ours.state_dict())
