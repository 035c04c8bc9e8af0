"""Graphs of the engine: buckets, growth, eviction, refresh, streams. Without a GPU a stand-in replays the launches."""

import contextlib
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import make_face, raising
from engines import Replays, batch, block, config, pair, poison, valid
from standins import spied

from jasper_fast import InferenceEngine
from jasper_fast.inference import engine as engine_module, graphs
from jasper_fast.inference.graphs import CudaGraphs, Turns
from jasper_fast.kernels import precision


@pytest.fixture
def device(monkeypatch):
    """Returns the device of the triton face; on a CPU a stand-in replaces CUDA graphs."""
    device = make_face("triton").device
    if device.type == "cpu":
        monkeypatch.setattr(engine_module, "CudaGraphs", Replays)
    return device


def graphed(device, kind="jasper", **options) -> InferenceEngine:
    _, ours = pair(config(kind), "triton", device)
    return InferenceEngine(ours, graphs=True, bucket=8, **options)


def captured(engine) -> int:
    """Returns the number of shapes that have a graph."""
    return sum(bound.replay is not None for bound in engine._run.shapes.held.values())


@pytest.mark.slow
def test_graphs_and_buckets_change_no_bit(device):
    """Results have the same bits as without graphs, also after longer or larger batches, for which the buffers grow,
    and with NaN in the buffers. Later calls do not change them."""
    _, ours = pair(config(), "triton", device)
    plain = InferenceEngine(ours, graphs=False, bucket=1)
    engine = InferenceEngine(ours, graphs=True, bucket=8, graph_limit=3)
    batches = [
        batch([40, 31, 40], device=device, scale=100.0),
        batch([9], device=device),
        batch([17, 0], t=20, device=device),
        batch([9], t=12, device=device),
        batch([33, 2, 40], device=device),
        batch([1], device=device),
    ]
    wanted = [plain(*b) for b in batches]
    order = (1, 0, 3, 0, 1, 5, 4, 2, 5, 1)
    found = []
    for i in order:
        poison(engine)
        found.append(engine(*batches[i]))
    for i, (got, lengths) in zip(order, found, strict=True):
        assert torch.equal(lengths, wanted[i][1]) and torch.equal(got, wanted[i][0]), f"batch {i}"
    assert captured(engine) == 3


@pytest.mark.slow
def test_without_masks_each_length_has_its_graph(device):
    eager, ours = pair(config(masks=False), "triton", device)
    engine = InferenceEngine(ours, graphs=True, bucket=8)
    for t in (20, 22, 20):
        features, lengths = batch([t, t], device=device)
        poison(engine)
        got, out = engine(features, lengths)
        want, want_out = eager(features, lengths)
        assert torch.equal(out, want_out)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    assert list(engine._run.shapes.held) == [(2, 22), (2, 20)]


@pytest.mark.parametrize(
    ("kind", "frames", "held"),
    [
        ("jasper", (9, 16, 12), [(1, 16)]),  # one bucket: with stride 2, 16 frames of features give 8 frames
        ("jasper", (17, 16), [(1, 32), (1, 16)]),
        # The longer input makes the buffers grow. Every graph is then dropped, because it would keep the old buffers.
        ("jasper", (16, 17), [(1, 32)]),
        ("plain residual", (24, 8, 24, 16), [(1, 24), (1, 16)]),  # the largest first, so that the buffers never grow
    ],
)
def test_lengths_of_a_bucket_share_a_graph_and_the_one_used_longest_ago_goes_first(kind, frames, held, device):
    engine = graphed(device, kind, graph_limit=2)
    for t in frames:
        engine(*batch([t], device=device))
    assert list(engine._run.shapes.held) == held


@pytest.mark.slow
def test_a_graph_does_not_outlive_its_scratch(device):
    """A graph is captured again if the memory for partial sums has grown since its capture."""
    engine = graphed(device, [block(64, 3, 11)])
    small, large = batch([12], device=device), batch([40, 40, 40], device=device)
    engine(*large)  # from here on the buffers do not grow
    want = engine(*small)[0]
    run = engine._run
    assert all(part.numel() > 0 for part in run._scratch()), "the reductions of this model are not split"
    held = run.shapes.held[1, 16].made_with
    run._workspace.reserve(10 * held[0].numel(), 10 * held[1].numel())
    assert torch.equal(engine(*small)[0], want)
    again = run.shapes.held[1, 16].made_with
    assert again[0] is run._workspace.part is not held[0] and again[1] is run._workspace.arrived is not held[1]


def test_a_graph_is_captured_again_where_fp32_arithmetic_is_to_change(device, monkeypatch):
    engine = graphed(device, "plain residual")
    features, lengths = batch([24, 17], device=device)
    engine(features, lengths)
    captures = spied(monkeypatch, engine._run.shapes.graphs, "capture", lambda launch: launch)
    engine(features, lengths)
    assert captures == []
    with precision.fp32("ieee" if engine._run._takes_tf32() else "tf32"):
        engine(features, lengths)
        engine(features, lengths)
    assert captures == [engine._run.shapes.held[2, 24].launch]


@pytest.mark.slow
def test_auto_captures_a_shape_when_it_comes_back(device):
    engine = graphed(device)
    engine._run.shapes.patient = True  # as with graphs="auto" on a GPU
    features, lengths = batch([31, 17], device=device)
    first, _ = engine(features, lengths)
    assert captured(engine) == 0
    second, _ = engine(features, lengths)
    assert captured(engine) == 1
    assert torch.equal(first, second) and torch.equal(engine(features, lengths)[0], first)


@pytest.mark.slow
def test_threads_share_an_engine(device):
    engine = graphed(device, "plain residual", graph_limit=1)
    batches = [batch(lengths, device=device) for lengths in ([24, 17], [9])]
    wanted = [engine(*b)[0].cpu() for b in batches]

    def right(i: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream(device) if device.type == "cuda" else None):
            # copied to the CPU on this stream, because the default stream does not wait for this stream
            return all(torch.equal(engine(*batches[i])[0].cpu(), wanted[i]) for _ in range(3))

    if device.type == "cuda":
        torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(right, range(2)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jasper", "dense first", "lengths change twice"])
def test_impossible_lengths_are_clamped_by_the_kernels(kind, device):
    """On a GPU the engine does not check lengths. The test calls its runner, which does not check them on a CPU
    either."""
    engine = graphed(device, kind)
    features, _ = batch([27, 27, 27], device=device)
    with torch.no_grad():
        want, want_out = engine._run.run(features, torch.tensor([27, 0, 5], device=device))
        poison(engine)
        got, out = engine._run.run(features, torch.tensor([1000, -4, 5], device=device))
    assert torch.equal(out, want_out) and torch.equal(got, want)


@pytest.mark.parametrize("kind", ["jasper", "dense first", "lengths change twice"])
@pytest.mark.parametrize("masks", [True, False])
def test_the_steps_through_the_library_are_captured_too(kind, masks, monkeypatch):
    """Graphs of the aten face replay correctly: with NaN in the buffers, for a batch shorter than its bucket, and for
    new lengths."""
    monkeypatch.setattr(engine_module, "CudaGraphs", Replays)
    _, ours = pair(config(kind, masks=masks), "reference")
    plain, engine = InferenceEngine(ours, graphs=False), InferenceEngine(ours, graphs=True, bucket=8, graph_limit=2)
    # without masks, padding is data, so all lengths are equal
    batches = [batch(of, t=t) if masks else batch([t] * len(of)) for of, t in (([21, 17], 21), ([20, 3], 22), ([9], 9))]
    for features, lengths in [*batches, *batches[:2]]:
        poison(engine)
        got, out = engine(features, lengths)
        kept = got.clone()
        want, want_out = plain(features, lengths)
        assert torch.equal(out, want_out) and got.shape == want.shape
        torch.testing.assert_close(valid(got, out), valid(want, out), atol=2e-5, rtol=1e-5)
        engine(*batches[0])
        assert torch.equal(got, kept), "results are memory of their own"
    assert captured(engine) == 2


def test_a_first_call_that_is_not_captured_has_no_rows_of_its_bucket(monkeypatch):
    monkeypatch.setattr(engine_module, "CudaGraphs", Replays)
    _, ours = pair(config(), "reference")
    engine = InferenceEngine(ours, graphs=True, bucket=8)
    engine._run.shapes.patient = True  # as with graphs="auto" on a GPU
    assert [engine(*batch([21, 17]))[0].shape for _ in range(2)] == [(2, 11, 7)] * 2 and captured(engine) == 1


class FakeCuda:
    """A stand-in for the parts of torch.cuda that graphs.py uses; `log` records the order of events."""

    def __init__(self):
        self.log: list[str] = []
        self.capturing = False
        self.current = self.Stream("cuda", "main")

    def Event(self):
        return SimpleNamespace(record=lambda stream: self.log.append(f"record on {stream.name}"))

    def CUDAGraph(self):
        return SimpleNamespace(
            capture_begin=lambda pool, capture_error_mode: self.log.append(f"begin {capture_error_mode}"),
            capture_end=lambda: self.log.append("end"),
            replay=lambda: self.log.append("replay"),
        )

    def Stream(self, device, name="side"):
        log = self.log
        return SimpleNamespace(
            device=device,
            name=name,
            wait_stream=lambda other: log.append(f"{name} waits for {other.name}"),
            wait_event=lambda event: log.append(f"{name} waits for the last turn"),
            synchronize=lambda: log.append(f"host waits for {name}"),
        )

    def stream(self, stream):
        return mock.patch.object(self, "current", stream)

    def device(self, device):
        return contextlib.nullcontext()

    def current_stream(self, device):
        return self.current

    def is_current_stream_capturing(self):
        return self.capturing


@pytest.fixture
def fake(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr(graphs, "cuda", fake)
    return fake


def test_capture_warms_up_on_a_side_stream_and_takes_no_pool_that_could_die(fake):
    made = CudaGraphs(torch.device("cuda"))
    replays = [made.capture(lambda: fake.log.append(f"launch on {fake.current.name}")) for _ in range(2)]
    once = ["side waits for main", "launch on side", "main waits for side"]
    once += ["begin thread_local", "launch on side", "end"]
    assert fake.log == once + once
    fake.log.clear()
    replays[0]()
    assert fake.log == ["replay"] and fake.current.name == "main"


def test_a_capture_that_fails_is_ended_and_names_the_remedy(fake):
    # the first call warms up
    launch = mock.Mock(side_effect=[None, ValueError("operation not permitted when stream is capturing")])
    with pytest.raises(RuntimeError, match=r"(?s)not permitted.*graphs=False") as error:
        CudaGraphs(torch.device("cuda")).capture(launch)
    assert isinstance(error.value.__cause__, ValueError)
    assert fake.log[-1] == "end" and fake.current.name == "main"


def test_an_error_of_the_launches_themselves_is_not_one_of_the_capture(fake):
    with pytest.raises(ValueError, match="does not compile"):
        CudaGraphs(torch.device("cuda")).capture(raising(ValueError("a kernel that does not compile")))


def test_turns_on_other_streams_wait_for_the_last(fake):
    turns = Turns(torch.device("cuda"))
    main, other = fake.current, fake.Stream("cuda", "other")
    for stream in (main, main, other, other, main):
        fake.current = stream
        with turns.turn():
            fake.log.append(f"work on {fake.current_stream(None).name}")
    assert fake.log == [
        *("work on main", "record on main"),
        *("work on main", "record on main"),
        *("other waits for the last turn", "work on other", "record on other"),
        *("work on other", "record on other"),
        *("main waits for the last turn", "work on main", "record on main"),
    ]


def test_a_turn_that_fails_is_waited_for_too(fake):
    turns = Turns(torch.device("cuda"))
    with pytest.raises(ValueError), turns.turn():
        raise ValueError
    fake.current = fake.Stream("cuda", "other")
    with turns.turn():
        pass
    assert fake.log == ["record on main", "other waits for the last turn", "record on other"]


def test_a_callers_own_capture_is_refused(fake):
    fake.capturing = True
    with pytest.raises(RuntimeError, match="outside of the capture"), Turns(torch.device("cuda")).turn():
        pass


def test_an_engine_that_goes_waits_for_the_stream_that_ran_last(device):
    """A deleted engine waits for the stream of its last call, because the allocator knows only the stream on which the
    buffers were made."""
    engine = InferenceEngine(pair(config(), "triton", device)[1])
    stream = engine._turns._stream = mock.Mock()
    del engine
    stream.synchronize.assert_called_once_with()


def test_a_refresh_lets_go_of_what_the_engine_had():
    engine = InferenceEngine(pair(config("one conv"), "reference")[1])
    old = weakref.ref(engine._turns)
    engine.refresh()
    assert old() is None
