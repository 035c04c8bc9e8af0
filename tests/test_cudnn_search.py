"""cuDNN searches for its fastest algorithm only where contenders run at the shape that is timed."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from bench_runs import CPU, CUDA, FAST, make_run, softplus_case
from standins import spied

from jasper_fast.bench.cases import train
from jasper_fast.bench.commands import launches, memory
from jasper_fast.bench.gpu import agenda
from jasper_fast.bench.harness import checking, cudnn_search, timing
from jasper_fast.bench.harness.measurement import Measurement


@pytest.fixture(autouse=True)
def searching():
    """Turns the search on, as on a GPU; on a CPU the flag has no effect."""
    cudnn_search.on(CUDA)
    assert searches()
    yield
    cudnn_search.on(CPU)
    assert not searches()


def searches() -> bool:
    return torch.backends.cudnn.benchmark


def test_contenders_are_searched_for_and_answers_are_not():
    seen: dict[str, set[bool]] = {"theirs": set(), "answers": set()}

    def spy(name: str, function):
        return lambda *a: seen[name].add(searches()) or function(*a)

    case = softplus_case({"eager": spy("theirs", F.softplus)})
    answers = {name: spy("answers", getattr(case, name)) for name in ("reference", "low")}
    m = Measurement(dataclasses.replace(case, **answers), CPU)
    checking.prepare(m)
    timing.measure(m, FAST)
    assert seen == {"theirs": {True}, "answers": {False}} and searches()


def test_a_search_goes_on_after_an_answer_that_failed():
    m = Measurement(dataclasses.replace(softplus_case({}), reference=lambda: 1 / 0), CPU)
    checking.prepare(m)
    assert m.failed and searches()


@pytest.mark.parametrize("judged_at", [(1, 64), (2, 64)])
def test_a_step_is_searched_for_at_the_batch_that_is_timed(judged_at, tmp_path, monkeypatch):
    """Shows that cuDNN searches in the check if the check has the timed batch size. The timed calls would be too
    late, because cuDNN searches only in the first call with a shape."""
    monkeypatch.setattr(train, "judged_size", lambda *_: judged_at)
    runner = train.case(make_run(tmp_path, rivals="eager"), "small", 2, 64, "forward+backward").contenders[1].build()
    seen = spied(monkeypatch, train.Batch, "loss", lambda *_: searches())
    runner.outputs()
    runner.run()
    assert seen == [judged_at == (2, 64), True]


def test_bytes_and_launches_are_counted_without_a_search(tmp_path, monkeypatch):
    run, seen = make_run(tmp_path), []
    monkeypatch.setattr(memory, "measure", lambda *_: seen.append(searches()) or [])
    memory.main(run, (("small", 1, 32),))
    monkeypatch.setattr(launches, "main", lambda run: seen.append(searches()))
    agenda.all_launches(run)
    assert seen == [False, False] and searches()
