"""Edge cases of what a user may pass: no utterances, double precision, copies of an engine."""

import copy
import pickle

import pytest
import torch
from test_model import config

from jasper_fast import InferenceEngine, Jasper, LogMelFeatures, fuse, ops
from jasper_fast.dispatch import backends
from jasper_fast.kernels.layout import ntc
from jasper_fast.nn.eager import EagerJasper

LENGTHS = torch.tensor([40, 23])


def jasper(backend: str = "auto", panes: str = "plain") -> Jasper:
    return Jasper(config("dense"), backend=backend, panes=panes).eval()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("panes", ["plain", "gram"])
def test_no_utterances_give_no_results(backend, panes):
    model = jasper(backend, panes)
    features, lengths = LogMelFeatures(n_mels=8).eval()(torch.zeros(0, 16000), LENGTHS[:0])
    assert features.shape[:2] == (0, 8) and lengths.shape == (0,)
    shape = InferenceEngine(model)(features, lengths)[0].shape
    log_probs, lengths = model(features, lengths)
    assert log_probs.shape == shape and len(shape) == 3 and not len(lengths)
    fused = EagerJasper(config("dense"))
    fuse(fused, backend)
    for training in (model.train(), fused.train()):
        with pytest.raises(ValueError, match=r"an empty batch \(N = 0\) has no statistics to train with"):
            training(features, lengths)


def test_a_conv_of_no_utterances():
    x, weight = torch.zeros(0, 8, 5, requires_grad=True), torch.randn(4, 8, 3, requires_grad=True)
    assert ntc(x).stride() == (40, 1, 8)
    y = ops.conv1d(x, weight)
    y.sum().backward()
    assert y.shape == (0, 4, 3) and x.grad.shape == x.shape and not weight.grad.any()


def test_double_precision_takes_the_reference():
    """fp64 runs with backend="auto". A face without fp64 raises an error that says to use the reference."""
    model, double = jasper(), jasper().double()
    double.load_state_dict(model.state_dict())
    features = torch.randn(2, 8, 40)
    for call, twin in ((model, double), (InferenceEngine(model), InferenceEngine(double))):
        got, want = call(features, LENGTHS)[0][0], twin(features.double(), LENGTHS)[0][0]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    double.train()(features.double(), LENGTHS)[0].sum().backward()
    assert all(p.grad.dtype == torch.float64 for p in double.parameters())
    if backends.is_available("cpu"):
        with pytest.raises(RuntimeError, match='for fp64 use backend="reference"'):
            jasper("cpu").double()(features.double(), LENGTHS)


def copied_under_meta(engine: InferenceEngine) -> InferenceEngine:
    with torch.device("meta"):
        return copy.deepcopy(engine)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda engine: pickle.loads(pickle.dumps(engine)), copied_under_meta]
)
def test_an_engine_can_be_copied(copied):
    """The copy has its own model, and the settings of the original."""
    model, features = jasper(), torch.randn(2, 8, 40)
    engine = InferenceEngine(model, dtype=torch.bfloat16, graphs=False, bucket=32)
    want = engine(features, LENGTHS)[0]
    made = copied(engine)
    assert torch.equal(made(features, LENGTHS)[0], want)
    assert (made._wanted, made._graphs, made._bucket) == (torch.bfloat16, False, 32)
    torch.nn.init.zeros_(model.decoder.layers[0].weight)
    made.refresh()
    engine.refresh()
    assert torch.equal(made(features, LENGTHS)[0], want) and not torch.equal(engine(features, LENGTHS)[0], want)
