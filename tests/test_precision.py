"""One switch sets the precision of fp32 products, in convs and matrix products, on every face and in plain PyTorch."""

import argparse
import copy
import threading
import types

import pytest
import torch
from engines import batch, config

import train
from jasper_fast import InferenceEngine, Jasper, options
from jasper_fast.bench import cli as bench
from jasper_fast.bench.harness import limits
from jasper_fast.cli import common
from jasper_fast.inference import recognizer
from jasper_fast.kernels import precision


@pytest.fixture(autouse=True)
def put_back():
    before = now()
    yield
    for switch, value in zip((torch.backends.cudnn.conv, torch.backends.cuda.matmul), before, strict=True):
        switch.fp32_precision = value


def now() -> tuple[str, str]:
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize("name", precision.FP32_PRECISIONS)
def test_it_governs_convs_and_matrix_products(name):
    triton = pytest.importorskip("jasper_fast.kernels.conv1d.triton_impl")
    before = now()
    with precision.fp32(name):
        assert now() == (name, name)
        assert triton.takes_tf32() == (name == "tf32")
        assert limits.float32_mode(torch.device("cuda", 0)) == {"tf32": "TF32", "ieee": "IEEE"}[name]
        precision.set_fp32(None)
        assert now() == (name, name)
    assert now() == before


def test_nothing_changes_by_another_name_or_after_an_error():
    before = now()
    with pytest.raises(ValueError, match="'bf16' is not one of ieee, tf32"):
        precision.set_fp32("bf16")
    with pytest.raises(KeyError), precision.fp32("tf32"):
        raise KeyError
    assert now() == before


def test_the_commands_take_the_same_names():
    data = ["--config", "c.yaml", "--train-manifests", "t.json", "--output-dir", "out"]
    assert train.arguments([*data, "--fp32-precision", "tf32"]).fp32_precision == "tf32"
    assert train.arguments(data).fp32_precision is None
    assert bench.parser().parse_args(["train", "--fp32-precision", "ieee"]).fp32_precision == "ieee"
    (option,) = (o for o in common.MODEL["speed"] if "--fp32-precision" in str(o))
    assert all(name in str(option) for name in precision.FP32_PRECISIONS)


@pytest.mark.slow
def test_a_run_of_the_bench_sets_it_and_records_it(tmp_path):
    arguments = ["train", "--quick", "--device", "cpu", "--out", str(tmp_path), "--fp32-precision", "tf32"]
    run = bench.start(bench.parser().parse_args(arguments), arguments)
    assert now() == ("tf32", "tf32")
    assert "tf32" in str(run.results.data), "the result does not record the precision"


def test_an_engine_has_its_own():
    """An engine and its copies use the engine's setting in every call. The setting of the process does not change."""
    model, (features, lengths), seen = Jasper(config("plain residual"), backend="reference").eval(), batch([24, 17]), []
    before = now()
    engine = InferenceEngine(model, fp32_precision="tf32")
    want = InferenceEngine(model)(features, lengths)[0]
    for one, expected in (
        (engine, ("tf32", "tf32")),
        (InferenceEngine(model, fp32_precision="ieee"), ("ieee", "ieee")),
        (copy.deepcopy(engine), ("tf32", "tf32")),
        (InferenceEngine(model), before),
    ):
        run = one._run.run
        one._run.run = lambda *args, run=run: (seen.append(now()), run(*args))[1]
        assert torch.equal(one(features, lengths)[0], want)
        assert seen.pop() == expected and not seen and now() == before
    with pytest.raises(ValueError, match="'fp16' is not one of ieee, tf32"):
        InferenceEngine(model, fp32_precision="fp16")


def test_those_who_set_it_for_a_while_take_turns():
    inside, found = threading.Event(), []

    def other():
        inside.wait(10)
        with precision.fp32("ieee"):
            found.append(now())

    thread = threading.Thread(target=other)
    thread.start()
    with precision.fp32("tf32"):
        inside.set()
        thread.join(0.1)
        assert now() == ("tf32", "tf32") and not found
    thread.join(10)
    assert found == [("ieee", "ieee")] and now() != ("tf32", "tf32")


def test_a_context_without_a_precision_restores_nothing():
    """Such a context may begin within another thread's context and end after it. If it restored the setting that it
    found, it would bring back that of the other thread."""
    before, none = now(), precision.fp32(None)
    with precision.fp32("ieee" if before[0] != "ieee" else "tf32"):
        none.__enter__()
    none.__exit__(None, None, None)
    assert now() == before


def test_the_commands_hand_it_to_the_engine(monkeypatch):
    taken = []
    monkeypatch.setattr(recognizer, "load", lambda *how: taken.append(how) or types.SimpleNamespace(vocabulary=None))
    monkeypatch.setattr(common, "decoder", lambda arguments, vocabulary: None)
    parser = argparse.ArgumentParser()
    options.add(parser, common.MODEL)
    before = now()
    common.load(parser.parse_args(["--checkpoint", "x", "--device", "cpu", "--fp32-precision", "ieee"]))
    assert taken[0][-1] == "ieee" and now() == before
