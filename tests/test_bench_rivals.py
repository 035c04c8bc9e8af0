"""Rivals compute the same results as eager, compilers never fall back to eager, and unknown rivals are errors."""

import gc
from types import SimpleNamespace

import engines
import pytest
import torch
from bench_runs import CPU, CUDA, make_run, row
from conftest import assert_raises
from test_tuning_clock import fake_cuda

from jasper_fast.bench import cli
from jasper_fast.bench.cases import (
    bn_relu_dropout,
    by_layer,
    depthwise,
    latency,
    models,
    sub_block_inference,
    sub_blocks,
    train,
)
from jasper_fast.bench.cases.layers import Layer
from jasper_fast.bench.harness.errors import Absent
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.report import goals
from jasper_fast.bench.rivals import choice, compiler, cuda_graphs
from jasper_fast.bench.rivals.eager_layouts import ChannelsLast2d, eager_no_masks
from jasper_fast.kernels import capture
from jasper_fast.nn.eager import EagerJasper


@torch.no_grad()
def test_rivals_compute_what_eager_computes():
    config = models.config("small")
    model = models.eager(config, models.weights(config, CPU, 64)).eval()
    x, lengths = models.features(config, 2, 64, CPU, 1)
    want, out_lengths = model(x, lengths)
    for build in (eager_no_masks, ChannelsLast2d):
        got, got_lengths = build(model)(x, lengths)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
        assert torch.equal(got_lengths, out_lengths)
    assert want.std() > 0.3, "activations vanished: a wrong layer would not show"
    assert model.config.encoder.use_conv_masks


def test_dropout_off_and_on_again():
    model = EagerJasper(models.config("small")).train()
    x, lengths = models.features(model.config, 2, 64, CPU, 1)
    with models.dropout_off(model):
        assert torch.equal(model(x, lengths)[0], model(x, lengths)[0])
    assert not torch.equal(model(x, lengths)[0], model(x, lengths)[0])


def test_unknown_rival_is_named():
    assert choice.only("training", "eager,cuda_graph") == choice.only("training", "cuda_graph") == "eager"
    assert choice.only("inference", "eager,cuda_graph") == "eager,cuda_graph"
    assert_raises(
        [
            (lambda: choice.choose("inference", CPU, "nobody"), "no rival 'nobody' for inference; known: eager"),
            (lambda: choice.only("training", "eager,nobody"), "no rival 'nobody'"),
        ]
    )


def test_a_rival_that_is_named_is_measured_and_no_other(tmp_path):
    run = make_run(tmp_path, rivals="compile")
    assert list(train.rivals_of(run)) == ["eager", "compile"]
    assert latency.case(latency.Models(run, "small"), "small", 1, 2.0).names == ["jasper_fast", "eager", "compile"]
    for rivals, names in (("eager", ["eager"]), ("default", ["eager", "eager_2d_channels_last"])):
        run = make_run(tmp_path, rivals=rivals)
        for case in (
            bn_relu_dropout.case(run, (1, 8, 9), "both", False, False),
            depthwise.case(run, depthwise.GOAL, "both"),
        ):
            assert case.names == ["jasper_fast", *names]


def test_a_run_of_everything_gives_each_kind_its_own_rivals(tmp_path, monkeypatch):
    seen = {}
    for command in (cli.kernels, cli.train, cli.latency, cli.memory):
        monkeypatch.setattr(command, "main", lambda run, *_, name=command.__name__, **more: seen.update({name: run}))
    monkeypatch.setattr(Run, "revisit", lambda run: seen.update(again=run))
    run = make_run(tmp_path, rivals="cudnn,onnxruntime,compile")
    cli.measure_all(run, None)
    rivals = {name.rpartition(".")[2]: found.rivals for name, found in seen.items()}
    assert rivals["kernels"] == run.rivals
    assert (rivals["train"], rivals["latency"]) == ("compile", "onnxruntime,compile")
    assert all(found.kept is run.kept and found.at_end is run.at_end for found in seen.values())
    assert seen["again"].deadline == run.deadline - cli.MEMORY_SECONDS, "the second timing leaves time for `memory`"


def test_the_cuda_face_has_a_row_of_its_own_on_a_gpu(tmp_path):
    def rivals(device: torch.device, **how: str) -> bool:
        return choice.CUDA_FACE in choice.for_sub_blocks(make_run(tmp_path, device=device, **how))

    assert rivals(CUDA, backend="auto") and rivals(CUDA, backend="auto", rivals="all")
    assert not rivals(CUDA, backend="cuda") and not rivals(CUDA, backend="auto", rivals="eager") and not rivals(CPU)
    run = make_run(tmp_path, rivals=f"eager,{choice.CUDA_FACE}", dtype=torch.float16)
    for case in (
        *by_layer.layer_cases(run, "sub_block", 1, 9, Layer(8, 8, 3), ("forward", "inference")),
        bn_relu_dropout.case(run, (1, 8, 9), "both", False, False),
    ):
        assert case.names[:1] == ["jasper_fast"] and case.names.count(choice.CUDA_FACE) == 1
        with pytest.raises(Absent, match="cuda"):
            next(c for c in case.contenders if c.name == choice.CUDA_FACE).build()


def test_the_cuda_face_is_no_rival_to_be_slower_than():
    conv = {"op": "conv1d"}
    rows = [row("kernels", "eager", conv), row("kernels", choice.CUDA_FACE, conv, ratio={"median": 0.5})]
    (verdict,) = goals.NeverSlower("never slower", "kernels", conv, 1.0).judge(rows)
    assert verdict["row"] == rows[0]["id"] and verdict["met"]


@pytest.mark.parametrize("op", ["conv1d", "sub_block"])
@pytest.mark.parametrize("layer", [Layer(8, 8, 3), Layer(8, 16, 3, stride=2)])
def test_cudnn_s_conv_comes_after_the_mask_or_the_whole_chain(op, layer, tmp_path, monkeypatch):
    class Conv:
        def __init__(self, x, weight, stride, padding, dilation, stats):
            self.weight, self.geometry = weight.unsqueeze(2), ((1, stride), (0, padding), (1, dilation))

        def __call__(self, x):
            return torch.nn.functional.conv2d(x.unsqueeze(2), self.weight, None, *self.geometry).squeeze(2)

    monkeypatch.setattr(sub_blocks, "FusedConv", Conv)
    case = sub_blocks.case(make_run(tmp_path, rivals="cudnn"), op, 2, 20, layer, "forward")
    runner = next(c for c in case.contenders if c.name == "cudnn").build()
    case.refill(1)
    assert case.complaints(runner.outputs(), case.low(), case.reference()) == []


@pytest.mark.parametrize("rival", ["cuda_graph", "tensorrt"])
def test_a_rival_that_needs_a_gpu_is_absent_in_a_run_on_the_cpu_of_a_machine_with_one(rival, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(Absent, match="needs an NVIDIA GPU"):
        choice.INFERENCE[rival](EagerJasper(engines.config(models._blocks(8, (), 1, 8), feats=8)))


# ------------------------------------------------------------------ compilers and graphs, on stand-ins


@pytest.fixture
def graphs_run(monkeypatch) -> list[int]:
    """Replaces torch.compile's backend by one that runs the graphs as they are. Returns a list with one entry per run
    of a graph."""
    ran: list[int] = []

    def backend(graph, _):
        return lambda *args: ran.append(1) or graph(*args)

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile(model, backend=backend, dynamic=False))
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):  # restored afterwards
        yield ran
    torch._dynamo.reset()


def dense(blocks: int) -> tuple[EagerJasper, torch.Tensor, torch.Tensor]:
    """Returns a model of two blocks with this many dense blocks between them, and its inputs."""
    config = engines.config(models._blocks(8, ((8, 3, 0.0),) * blocks, 1, 8), feats=8)
    return EagerJasper(config).eval(), torch.randn(1, 8, 20), torch.tensor([20])


@pytest.mark.slow
@torch.no_grad()
def test_every_block_of_twelve_is_compiled(graphs_run):
    """By default PyTorch compiles eight variants of a function and then falls back to eager with only a warning."""
    model, x, lengths = dense(10)
    call = compiler.compiled_blocks_frozen(model)
    for _ in range(2):
        torch.testing.assert_close(call(x, lengths)[0], model(x, lengths)[0])
    assert len(graphs_run) == 2 * 12


@pytest.mark.slow
@torch.no_grad()
def test_every_shape_of_a_grid_is_compiled_or_an_error(graphs_run, monkeypatch):
    model, *_ = dense(0)
    call = compiler.compiled(model)
    inputs = [(torch.randn(1, 8, T), torch.tensor([T])) for T in range(20, 40, 2)]
    for x, lengths in inputs:
        call(x, lengths)
    assert len(graphs_run) == len(inputs) > 8
    monkeypatch.setattr(compiler, "VARIANTS", 3)
    call = compiler.compiled(model)
    with pytest.raises(Exception, match="recompile_limit"):
        for x, lengths in inputs:
            call(x, lengths)


def test_a_sub_block_s_compiled_function_never_runs_in_eager(graphs_run):
    """A function may have more than eight compiled variants, and those of an earlier function do not count."""
    with torch._functorch.config.patch(donated_buffer=True):  # restored afterwards
        for _ in range(2):
            call = compiler.max_autotuned(lambda x: 2 * x, "forward")
            for n in range(2, 12):
                call(torch.ones(n))
    assert len(graphs_run) == 2 * 10


@pytest.mark.slow
def test_a_frozen_sub_block_never_runs_in_eager(graphs_run):
    i = sub_block_inference.Inputs(1, 20, Layer(4, 4, 3), torch.float32, CPU)
    call = sub_block_inference.max_autotuned_frozen(i)  # runs one graph
    with torch.inference_mode():
        for T in range(21, 31):
            call(torch.zeros(1, 4, T), i.lengths)
    assert len(graphs_run) == 1 + 10


def test_a_capture_is_warmed_up_on_a_side_stream_and_nothing_is_collected_in_it(monkeypatch):
    fake = fake_cuda()
    stream = SimpleNamespace(wait_stream=lambda other: fake.log.append("the other stream"))
    fake.Stream = fake.current_stream = lambda device: stream
    monkeypatch.setattr(torch, "cuda", fake)

    def work() -> str:
        fake.log.append("call" if gc.isenabled() else "call, no collection")
        return f"result {len(fake.log)}"

    _, out = capture.captured(work, before=2)
    assert out == "result 7" and gc.isenabled()
    assert fake.log == [
        "the other stream", "side", "call", "call", "wait", "capture_begin", "call, no collection", "capture_end",
        "the other stream",
    ]  # fmt: skip


def test_a_graph_s_answers_are_of_the_call_s_own_inputs(monkeypatch):
    """A graph copies its inputs in and its results out. Each shape has a graph of its own."""

    class Graph:
        def __init__(self, call) -> None:
            self.call, self.out = call, call()

        def replay(self) -> None:
            for held, new in zip(self.out, self.call(), strict=True):
                held.copy_(new)

    made: list[Graph] = []

    def captured(call, before: int):
        made.append(Graph(call))
        return made[-1], made[-1].out

    monkeypatch.setattr(cuda_graphs, "needs_gpu", lambda *_: None)
    monkeypatch.setattr(capture, "captured", captured)
    config = models.config("small")
    model = models.eager(config, models.weights(config, CPU, 64)).eval().requires_grad_(False)
    call = cuda_graphs.cuda_graph(model)
    inputs = [models.features(config, N, 64, CPU, seed, ragged=True) for seed, N in ((1, 2), (2, 2), (3, 1))]
    for i, (log_probs, lengths) in zip(inputs, [call(*i) for i in inputs], strict=True):
        want, out_lengths = model(*i)
        assert torch.equal(log_probs, want) and torch.equal(lengths, out_lengths)
    assert len(made) == 2
