"""Latency: an engine with a small fault gets no time, each text is compared with the best path of the
log-probabilities, and the number of samples depends on the device."""

import ctypes
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from bench_runs import CPU, DTYPES, make_run

from jasper_fast import InferenceEngine
from jasper_fast.bench.cases import counts, latency, models
from jasper_fast.bench.commands import latency as latency_command
from jasper_fast.bench.harness import ratios
from jasper_fast.bench.harness.case import Case, Effort
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.rivals import choice, runtimes
from jasper_fast.bench.rivals.eager_layouts import Model
from jasper_fast.speech.text import Vocabulary

LETTERS = Vocabulary()


def norms(state: dict) -> list[str]:
    """Returns the names of the batch norms in the order of the layers."""
    return [k.removesuffix(".running_mean") for k in state if k.endswith(".running_mean")]


def scaled(state: dict, names: list[str], factor: float, entries: tuple[str, ...] = ("weight", "bias")) -> dict:
    """Returns `state` with these entries of the batch norms `names` multiplied by `factor`."""
    return state | {f"{n}.{k}": state[f"{n}.{k}"] * factor for n in names for k in entries}


def a_layer(state: dict) -> list[str]:
    """Returns a list of one name: the batch norm of the third last sub-block."""
    return [n for n in norms(state) if ".conv." in n][-3:-2]


def last_panes(state: dict) -> list[str]:
    """Returns the names of the batch norms in the panes of the last dense block."""
    panes = [n for n in norms(state) if ".res." in n]
    return [n for n in panes if n.split(".res.")[0] == panes[-1].split(".res.")[0]]


WEIGHTS = {
    "a layer scaled by 1.01": lambda state: scaled(state, a_layer(state), 1.01),
    "a layer scaled by 1.15": lambda state: scaled(state, a_layer(state), 1.15),
    # the bias that the first conv gets when its batch norm is folded into it becomes zero
    "no bias": lambda state: scaled(state, norms(state)[:1], 0.0, ("bias", "running_mean")),
    "no panes": lambda state: scaled(state, last_panes(state), 0.0),
}


def stale_frames(call: Model) -> Model:
    """Returns a model whose frame 7 repeats the result of the previous call, from the second call on."""
    frames: list[torch.Tensor] = []

    def stale(x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs, out = call(x, lengths)
        frames.append(log_probs[:, 7].clone())
        log_probs = log_probs.clone()
        log_probs[:, 7] = frames[-2:][0]
        return log_probs, out

    return stale


# In bf16 eager's own error is 0.5 % of the output, so a layer scaled by 1.01 cannot be found.
FAULTS = [
    ("fp32", "a layer scaled by 1.01"),
    ("fp16", "a layer scaled by 1.01"),
    ("bf16", "a layer scaled by 1.15"),
    # fp16 is left out: it has the tolerance of bf16 but smaller rounding errors, so these faults are easier to find
    *((dtype, fault) for dtype in ("fp32", "bf16") for fault in ("no bias", "no panes", "stale frames")),
]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Replaces utterances of 2 s by utterances of 0.6 s."""
    monkeypatch.setitem(models.FRAMES, 2.0, 64)


def engine(change=dict, dtype=torch.float32, around=lambda engine: engine):
    """Returns a function for `rows_of` that makes an engine with the weights `change(state)`, wrapped by `around`."""

    def build(shared: latency.Models) -> Model:
        fused = models.fused(shared.cfg, change(shared.state), "reference").eval()
        return around(InferenceEngine(fused, dtype=dtype))

    return build


def rows_of(tmp_path, case_of, dtype=torch.float32, engine=None) -> dict[str, dict]:
    """Measures a case of the small model and returns its rows by contender. `engine` makes what replaces our engine."""
    run = make_run(tmp_path, dtype=dtype, rivals="eager,eager_2d_channels_last")
    shared = latency.Models(run, "small")
    if engine is not None:
        shared.engine = lambda _: engine(shared)
    return {row["contender"]: row for row in run.cases("test", [case_of(shared)])}


def acoustic(shared: latency.Models) -> Case:
    return latency.case(shared, "small", 1, 2.0)


def heard(shared: latency.Models) -> Case:
    return latency.sound_case(shared, "small", 2, 0.6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_contenders_have_times(dtype, tmp_path):
    rows = rows_of(tmp_path, acoustic, DTYPES[dtype])
    assert [*rows] == ["jasper_fast", "eager", "eager_2d_channels_last"]
    assert all(row["status"] == "ok" for row in rows.values()), [row.get("why") for row in rows.values()]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "fault"), FAULTS)
def test_a_faulty_engine_has_no_time(dtype, fault, tmp_path):
    faulty = engine(WEIGHTS.get(fault, dict), DTYPES[dtype], stale_frames if fault == "stale frames" else lambda e: e)
    rows = rows_of(tmp_path, acoustic, DTYPES[dtype], faulty)
    ours = rows.pop("jasper_fast")
    assert ours["status"] == "wrong" and ours["why"].startswith("log_probs: "), ours
    assert all(row["status"] == "ok" for row in rows.values()), [row.get("why") for row in rows.values()]


def test_a_large_model_is_judged_in_fp32_on_a_cpu_and_by_eager_s_error_in_a_lower_precision(run, tmp_path, monkeypatch):
    assert latency.Models(run, "small").judged_in is torch.float64
    large = latency.Models(run, "jasper10x5")
    assert large.judged_in is torch.float32 and large.low(tuple) is None
    assert latency.Models(dataclasses.replace(run, dtype=torch.bfloat16), "jasper10x5").low(tuple) is not None
    # With 333e6 parameters the small model counts as large, so eager's own error is not measured. The fixed tolerance
    # must still reject a layer that is wrong by one per cent.
    monkeypatch.setattr(counts, "parameters", lambda cfg: 333e6)
    rows = rows_of(tmp_path, acoustic, engine=engine(WEIGHTS["a layer scaled by 1.01"]))
    assert [row["status"] for row in rows.values()] == ["wrong", "ok", "ok"], [r.get("why") for r in rows.values()]


def test_a_network_in_int8_is_judged_by_its_best_classes():
    rule, lengths = latency.int8_rule(), torch.tensor([3, 2])
    ref = {"log_probs": torch.eye(4).expand(2, 4, 4), "lengths": lengths}
    judge = lambda got: rule.judge(ref | got, None, ref, rule.found)  # noqa: E731
    assert judge({}) == judge({"log_probs": 2 * ref["log_probs"]}) == [] and rule.found["max_error"] == 1.0
    (line,) = judge({"log_probs": ref["log_probs"].flip(1)})
    assert "best class equal to eager's in 0.0 % of the frames" in line
    assert judge({"log_probs": ref["log_probs"].clone().fill_(float("nan"))}) == ["log_probs: not all are finite"]
    assert judge({"lengths": lengths - 1}) == ["lengths: they differ from eager's"]


# ------------------------------------------------------------------ sound to text


DECODERS = {
    # "book" becomes "bok"
    "drops repeated letters": lambda right: lambda *a: ["".join(c for c, _ in itertools.groupby(t)) for t in right(*a)],
    "skips an utterance": lambda right: lambda *a: right(*a)[:-1],
    "leaves one silent": lambda right: lambda *a: [*right(*a)[:-1], ""],
    "swaps utterances": lambda right: lambda *a: right(*a)[::-1],
    "ignores the last frames": lambda right: lambda p, n, words: right(p, n // 2, words),
}


@pytest.mark.parametrize("fault", DECODERS)
def test_a_decoder_that_misreads_has_no_time(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "greedy_decode", DECODERS[fault](latency.greedy_decode))
    rows = rows_of(tmp_path, heard).values()
    assert all(row["status"] == "wrong" and row["why"].startswith("text") for row in rows), rows


def test_texts_and_lengths_of_the_drawn_path_tell_decoders_apart():
    log_probs, lengths = latency.repeating(3, 50, LETTERS, CPU)
    texts = latency.greedy_decode(log_probs, lengths, LETTERS)
    assert not latency.misread(log_probs, lengths, texts, LETTERS)
    assert lengths.tolist() == [50, 37, 25] and any(a == b for a, b in itertools.pairwise(texts[0]))


@pytest.mark.slow
def test_sound_to_text_is_right_as_it_stands_and_wrong_with_a_faulty_model(tmp_path):
    for faulty, status in ((None, "ok"), (engine(WEIGHTS["a layer scaled by 1.01"]), "wrong")):
        rows = rows_of(tmp_path, heard, engine=faulty)
        assert {name: row["status"] for name, row in rows.items()} == {"jasper_fast": status, "eager": "ok"}


def test_the_best_path_by_hand():
    symbols = [*LETTERS.labels, "-"]
    for path, length, text in (
        ("-bbo-ook--", 10, "book"),
        ("ooo", 3, "o"),
        ("--", 2, ""),
        ("o-o", 3, "oo"),
        ("bok", 2, "bo"),
    ):
        log_probs = torch.eye(len(symbols))[[symbols.index(c) for c in path]]
        assert latency.best_path(log_probs, length, LETTERS.labels) == text


# ------------------------------------------------------------------ how much is measured


def on(run: Run, device: str) -> Run:
    return dataclasses.replace(run, device=torch.device(device), effort=Effort(), quick=False)


def test_a_gpu_measures_the_whole_grid_of_both_and_a_cpu_what_it_has_time_for(run):
    grids, whole = latency_command.grids, (latency_command.GRID, latency_command.GRID)
    gpu, cpu = on(run, "cuda"), on(run, "cpu")
    assert grids(gpu, False, ()) == grids(cpu, True, ()) == whole
    assert grids(gpu, False, ((1, 2.0),)) == (((1, 2.0),), ((1, 2.0),))
    assert grids(cpu, False, ())[1] == ((1, 2.0), (1, 7.0))
    assert grids(dataclasses.replace(cpu, brief=True), False, ())[1] == ((1, 2.0),)
    assert grids(run, False, ())[1] == (), "--quick"


def test_sound_to_text_meets_cuda_graphs_where_they_are_asked_for(tmp_path):
    for wanted, names in (("default", ["eager"]), ("eager,compile,cuda_graph", ["eager", "cuda_graph"])):
        shared = latency.Models(make_run(tmp_path, rivals=wanted), "small")
        assert [c.name for c in latency.sound_case(shared, "small", 1, 2.0).contenders] == ["jasper_fast", *names]
    assert set(latency.SOUND_RIVALS) <= set(choice.DEFAULT["inference", "cuda"])


def test_a_gpu_takes_the_samples_that_a_p99_takes(run):
    def asked(run: Run) -> list[Effort]:
        shared = latency.Models(run, "small")
        return [make(shared, "small", 1, 2.0).effort(run.effort) for make in (latency.case, latency.sound_case)]

    for effort in asked(on(run, "cuda")):
        assert effort.max_rounds >= effort.min_rounds >= ratios.SAMPLES["p99"]
        assert effort.seconds == Effort().seconds / 2
    assert asked(on(run, "cpu")) == [Effort()] * 2
    assert all(effort.min_rounds < 100 for effort in asked(dataclasses.replace(on(run, "cuda"), quick=True)))


# ------------------------------------------------------------------ ONNX Runtime


class Session:
    """A stand-in for an ONNX Runtime session and for its binding of names to memory."""

    def __init__(self, model) -> None:
        self.model = model

    def io_binding(self) -> "Session":
        self.bound = {}
        return self

    def bind_input(self, name, device_type, device_id, element_type, shape, buffer_ptr) -> None:
        assert (device_type, device_id) == ("cpu", 0)
        size = int(np.prod(shape)) * np.dtype(element_type).itemsize
        memory = (ctypes.c_byte * size).from_address(buffer_ptr)
        self.bound[name] = torch.from_numpy(np.frombuffer(memory, element_type).reshape(shape))

    bind_output = bind_input

    @torch.no_grad()
    def run_with_iobinding(self, binding) -> None:
        found = self.model(binding.bound["features"].float(), binding.bound["lengths"])
        for name, t in zip(("log_probs", "out_lengths"), found, strict=True):
            assert t.shape == binding.bound[name].shape
            binding.bound[name].copy_(t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_onnx_runtime_is_given_tensors_where_they_are(dtype, run):
    shared = latency.Models(run, "small")
    call = runtimes.bound(Session(shared.plain), shared.plain)
    x, lengths = models.features(shared.cfg, 2, 63, CPU, 1, ragged=True)
    x = x.to(dtype)
    first, out = call(x.transpose(1, 2).contiguous().transpose(1, 2), lengths)  # the input is in another memory order
    want, out_lengths = shared.plain(x.float(), lengths)
    assert torch.equal(first, want) and torch.equal(out, out_lengths)
    call(torch.zeros_like(x), lengths)
    assert torch.equal(first, want), "the next call overwrote the answer"
    with pytest.raises(ValueError, match="use --dtype fp32 or fp16"):
        call(x.bfloat16(), lengths)
