"""The graphed step without a GPU: a recorder of PyTorch's ops takes the place of CUDA graphs, and steps on a stand-in
device show whether an operation cannot be captured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import interpreted
from graph_recorder import place, tensors
from graph_rig import Rig, batch, padded, same
from test_novograd import emulated

from jasper_fast.bench.cases.full_step import full_step
from jasper_fast.bench.harness.errors import Absent
from jasper_fast.data.batch import Batch
from jasper_fast.dispatch import choose
from jasper_fast.kernels import capture, launch
from jasper_fast.kernels.novograd import cuda_launch
from jasper_fast.training import graphed, step
from jasper_fast.training.graphed import GraphedStep
from jasper_fast.training.optim import NovoGrad
from jasper_fast.training.step import Frontend, StepResult


@pytest.fixture(autouse=True)
def loss_on_the_device(monkeypatch):
    """Uses the CTC loss that a CUDA graph can capture, `ops.ctc_loss`, but on the reference face, which is faster than
    interpreted Triton."""
    interpreted()
    monkeypatch.setattr(step, "loss_is_capturable", lambda device: True)
    monkeypatch.setattr(graphed, "loss_is_capturable", lambda device: True)
    monkeypatch.setattr(choose, "ctc_face", lambda backend, device: "reference")


def both(
    ours: Rig, made: GraphedStep, plain: Rig, seed: int, batches: list[Batch], pad: bool = True
) -> list[StepResult]:
    """Makes a graphed and a plain step over the same batches from one seed. The plain step gets the batches padded if
    `pad` is true. The learning rate changes with the seed. Returns both results. Asserts that the states of both rigs
    and of the random generator are equal bit by bit."""
    for rig in (ours, plain):
        rig.optimizer.param_groups[0]["lr"] = 2.0 ** -(7 + seed % 3)  # exact in fp32, in which a graph may read it
    results, states = [], []
    for run, given in ((made, batches), (plain.plain, [padded(b, made._shape(b)) if pad else b for b in batches])):
        torch.manual_seed(seed)
        results.append(run(given))
        states.append(torch.get_rng_state())
    assert ours.equal(plain) and torch.equal(*states), f"step {seed}"
    return results


@pytest.mark.parametrize(
    ("optimizer", "steps", "how"),
    [("novograd", 12, {"amp_dtype": torch.bfloat16, "scale": True, "clip_norm": 1.0}), ("adamw", 20, {})],
)
@pytest.mark.slow
def test_graphed_steps_are_plain_ones_bit_by_bit(optimizer, steps, how, monkeypatch):
    """Uses dropout, dither, augmentation, two shapes, changing learning rates and one NaN."""
    ours, plain = Rig(optimizer, **how), Rig(optimizer, **how)
    made, recorder = ours.graphed(monkeypatch, bucket=16)
    for i in range(steps):
        one = batch(2, 0.4 + 0.02 * (i % 3), 3, i) if i % 4 else batch(3, 0.15, 2, i)
        if i == 9:
            one.audio[0, 50] = torch.nan
        results = both(ours, made, plain, i, [one])
        assert [r.names for r in results] == [one.names] * 2
        for name in ("losses", "heard", "grad_norm", "log_probs", "lengths"):
            assert same(*(tensors([getattr(r, name)]) for r in results)), f"{name} of step {i}"
        assert ours.ema.updates == plain.ema.updates == i + 1
    assert len(recorder.tapes) == len(made.graphs) == 2 and recorder.replays == steps - 2
    assert results[0].grad_norm.isfinite() and ours.scaler.get_scale() == plain.scaler.get_scale()


class Taped:
    """NovoGrad's CUDA functions, emulated on the CPU. They go through `launch.run`, where the tape records the launch
    and its tensors."""

    def __init__(self, monkeypatch) -> None:
        self._functions, self._given, self.launched = emulated(), [], 0
        monkeypatch.setattr(cuda_launch, "functions", lambda: self)
        monkeypatch.setattr(NovoGrad, "_face", lambda self, device, params: "cuda")
        address = torch.Tensor.data_ptr
        monkeypatch.setattr(torch.Tensor, "data_ptr", lambda x: (self._given.append(x), address(x))[1])

    def __getitem__(self, grid: tuple[int, str]):
        self.launched += 1
        return lambda args, *given, **options: getattr(self._functions, grid[1])(None, grid[0], args)

    def jf_novograd_squares(self, stream, grid, args) -> None:
        launch.run(self, (grid, "jf_novograd_squares"), torch.empty(0), args, *self._given)

    def jf_novograd_update(self, stream, grid, args) -> None:
        launch.run(self, (grid, "jf_novograd_update"), torch.empty(0), args, *self._given)
        self._given.clear()


@pytest.mark.slow
def test_novograd_in_cuda_is_graphed_too(monkeypatch):
    """Shows that graphed steps of the CUDA face equal plain steps bit by bit. Each graph reads its own table and
    settings, although plain steps and the other graph send theirs in between."""
    taped = Taped(monkeypatch)
    ours, plain = Rig(), Rig()
    made, recorder = ours.graphed(monkeypatch, bucket=16)
    for i, seconds in enumerate((0.2, 0.2, 0.4, 0.2, 0.4, 0.2, 0.8, 0.4)):
        one = batch(1, seconds, 2, i)
        if i == 3:
            one.audio[0, 50] = torch.nan
        both(ours, made, plain, i, [one])
    assert len(recorder.tapes) == 2 and recorder.replays == 5 and taped.launched == 2 * (8 + 8)
    kept = tensors([graph.held for graph in made.graphs.values()])
    assert len(kept) == 2 * 3  # table, runs and settings
    assert not set(map(place, kept)) & (recorder.tapes[0].made | recorder.tapes[1].made)


def test_micro_batches_are_one_step(monkeypatch):
    ours, plain = Rig("adamw"), Rig("adamw")
    made, recorder = ours.graphed(monkeypatch, bucket=16)
    for i in range(3):
        got, want = both(ours, made, plain, i, [batch(2, 0.3, 3, i), batch(1, 0.2, 2, 50 + i)])
        assert got.names == want.names and got.texts == want.texts
        assert same(got.losses, want.losses) and len(got.losses) == 2
    assert recorder.replays == 2


@pytest.mark.slow
def test_the_graphs_used_last_are_kept(monkeypatch):
    made, recorder = Rig("adamw").graphed(monkeypatch, bucket=16, limit=2)
    for seconds in (0.2, 0.2, 0.5, 0.5, 0.2, 0.8, 0.8, 0.2, 0.5):
        made([batch(1, seconds, 2, 0)])
    assert [shapes[0][0][1] for shapes in made.graphs] == [(32 - 1) * 160, (64 - 1) * 160]
    assert len(recorder.tapes) == 4  # the graph for 0.8 s replaced the one for 0.5 s, which was then captured again
    made.forget()
    made([batch(1, 0.2, 2, 0)])
    assert not made.graphs and len(recorder.tapes) == 4


def test_what_a_graph_needs_is_kept_alive(monkeypatch):
    """Shows that a graph keeps its packs alive when the model makes new ones. The replay asserts that all memory of the
    graph is alive."""
    ours = Rig("adamw", amp_dtype=torch.bfloat16)
    made, _ = ours.graphed(monkeypatch, bucket=16)
    for _ in range(2):
        made([batch(1, 0.2, 2, 0)])
    (graph,) = made.graphs.values()
    assert len(graph.alive) == 3  # the packs of its convs
    for layer in ours.model.encoder.layers:
        layer.packs._held.clear()
    made([batch(1, 0.2, 2, 1)])
    graph.alive.clear()
    with pytest.raises(AssertionError, match="have been freed"):
        made([batch(1, 0.2, 2, 2)])


def test_what_the_host_sends_to_a_graph_lies_outside_of_its_memory(monkeypatch):
    """Shows that what the host sends to a graph is in memory that no graph allocated. Graphs share a pool, so one graph
    may overwrite what another allocated."""
    made, recorder = Rig("novograd").graphed(monkeypatch, bucket=16)
    for _ in range(2):
        made([batch(1, 0.2, 2, 0)])
    (graph,), (tape,) = made.graphs.values(), recorder.tapes
    (held,) = graph.held.values()
    sent = tensors([x for name, x in held.items() if name not in ("one", "zero")])  # the graph itself writes these two
    assert len(sent) == 3 and not set(map(place, sent)) & tape.made  # table, runs and settings


def test_a_step_that_sends_more_than_there_is_room_for_is_not_captured(monkeypatch):
    monkeypatch.setattr(capture, "ROOM", 64)
    said = []
    made, _ = Rig("novograd").graphed(monkeypatch, bucket=16, say=said.append)
    for _ in range(2):
        made([batch(1, 0.2, 2, 0)])
    assert "take more than 64 bytes" in said[0] and not made.possible


@pytest.mark.parametrize("where", ["in the step", "at the end"])
def test_a_broken_capture_sets_the_allocator_free(where, monkeypatch):
    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            assert (pool, capture_error_mode) == ((0, 7), "thread_local")

        def capture_end(self):
            raise RuntimeError("the capture was invalidated")

    def launch():
        if where == "in the step":
            raise ValueError("read by the host")

    ended = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *of, name=name: ended.append((name, *of)), raising=False)
    with pytest.raises(ValueError if where == "in the step" else RuntimeError, match=r"read by the host|invalidated"):
        capture.record(Graph(), launch)
    assert ended == [("_cuda_endAllocateToPool", 3, (0, 7)), ("_cuda_releasePool", 3, (0, 7))]


def test_a_frontend_of_another_kind_gets_what_it_was_given(monkeypatch):
    """Shows that input other than audio is not padded, because only the padding value of audio is known."""
    ours, plain = Rig("adamw"), Rig("adamw")
    for rig in (ours, plain):
        rig.frontend = lambda features, lengths: (features, lengths, lengths)
    made, recorder = ours.graphed(monkeypatch, bucket=16)
    for i in range(3):
        one = batch(2, 0.3, 3, i)
        one.audio, one.audio_lengths = torch.randn(2, 32, 50), torch.tensor([50, 31])
        assert made._shape(one) == ((2, 32, 50), 32)
        both(ours, made, plain, i, [one], pad=False)
    assert recorder.replays == 2


def test_the_bench_has_it_only_where_it_can_be():
    rig = Rig()
    with pytest.raises(Absent, match="CUDA graphs need a GPU"):
        full_step(rig.model, rig.model, rig.model.config, tuple, torch.float32, graphs=True)


class Reading(Frontend):
    """A frontend that reads a value on the host."""

    def forward(self, audio, lengths):
        assert audio.sum().item() < 1e9
        return super().forward(audio, lengths)


@pytest.mark.parametrize("optimizer", ["novograd", "adamw"])
def test_where_a_step_cannot_be_captured_plain_ones_go_on(optimizer, monkeypatch):
    ours, plain, said = Rig(optimizer), Rig(optimizer), []
    for rig in (ours, plain):
        rig.frontend = Reading(rig.frontend.features, rig.frontend.augment).train()
        if optimizer == "novograd":
            rig.optimizer.backend = "cpu"
    made, _ = ours.graphed(monkeypatch, bucket=16, say=said.append)
    for i in range(3):
        both(ours, made, plain, i, [batch(2, 0.3, 3, i)], pad=i < 2)
    assert ours.ema.updates == plain.ema.updates == 3
    assert len(said) == 1 and "could not be captured (_local_scalar_dense" in said[0] and not made.possible


def test_hindrances_are_told_in_a_line(monkeypatch):
    told, rig = [], Rig("adamw")
    made = GraphedStep(rig.model, rig.frontend, rig.optimizer, rig.scaler, rig.guard, **rig.how, say=told.append)
    assert made([batch(1, 0.2, 2, 0)]).names == ["0 0"]
    assert "need a GPU, but the model is on cpu" in told[-1]
    rig.optimizer = torch.optim.SGD(rig.model.parameters(), lr=0.1)
    rig.graphed(monkeypatch, say=told.append)
    assert "SGD skips steps on the host: use NovoGrad, or AdamW(..., fused=True)" in told[-1]
    monkeypatch.setattr(graphed, "loss_is_capturable", lambda device: False)
    Rig("adamw").graphed(monkeypatch, say=told.append)
    assert "CTC loss reads lengths on the host" in told[-1]
    assert all("\n" not in line for line in told) and len(told) == 3
    with pytest.raises(ValueError, match="at least 1"):
        Rig("adamw").graphed(monkeypatch, limit=0)


# ---- operations that would break a capture, on a stand-in device ----


@pytest.fixture(scope="module")
def counted() -> dict:
    """Returns the results of tests/graph_stand_in.py. It runs in a process of its own, because a process can register
    only one such device."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("graph_stand_in.py")
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_nothing_of_a_captured_step_waits_for_the_device(counted):
    """Shows that a captured step with every augmentation reads no value on the host and uses no tensor of the CPU. The
    CTC loss runs in Triton, NovoGrad in Triton or in CUDA."""
    for name, found in counted["steps"].items():
        assert found["possible"] and found["said"] == [], (name, found)
        assert found["breaks"] == [], (name, found)
        assert found["ops"] > 300 and {"_ctc_alpha_kernel", "_ctc_gradient_kernel"} <= set(found["launched"])
        mine = {"_update_kernel", "update"} & set(found["launched"])
        assert mine == ({"update"} if "cuda" in name else {"_update_kernel"} if "novograd" in name else set())


@pytest.mark.slow
def test_what_would_break_a_capture_is_found(counted):
    for name, (wanted, found) in counted["wrong"].items():
        assert any(wanted in line for line in found), (name, wanted, found)
