"""The harness of bench: ratios and their intervals, second visits, results of an interrupted run, cuDNN's search."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bench_runs import CPU, CUDA, HEADER, again, make_run, softplus_case, timed, written
from conftest import raising
from standins import spied

from jasper_fast.bench.cases import bn_relu_dropout, by_layer, common, train
from jasper_fast.bench.commands import launches, memory
from jasper_fast.bench.gpu import agenda
from jasper_fast.bench.harness import checking, cudnn_search, devices, ratios, result_file, timing
from jasper_fast.bench.harness.case import Contender, Effort, Runner
from jasper_fast.bench.harness.measurement import Measurement
from jasper_fast.bench.report import words


def test_ratio_is_pair_by_pair_and_its_interval_holds_the_truth():
    drift = torch.linspace(1.0, 3.0, 60)  # the machine becomes three times as slow during the run
    ours, rival = ((time * drift * (1 + 0.02 * torch.randn(60))).tolist() for time in (1.0, 1.5))
    found = ratios.ratio(rival, ours)
    assert found["low"] <= 1.5 <= found["high"] and found["high"] - found["low"] < 0.05 and found["pairs"] == 60


def test_a_second_visit_widens_the_interval_to_what_both_would_have_said():
    first = {"ours": [1.0, 1.0, 1.0, 1.0], "eager": [2.0, 2.0, 2.0, 2.0]}
    second = {"ours": [1.0, 1.0], "eager": [2.4, 2.4]}  # the machine runs at another speed
    assert ratios.ratio_of_visits([first], "eager", "ours") == ratios.ratio(first["eager"], first["ours"])
    found = ratios.ratio_of_visits([first, second], "eager", "ours")
    assert (found["low"], found["median"], found["high"]) == (2.0, 2.0, pytest.approx(2.4))
    assert (found["pairs"], found["visits"]) == (6, 2)


def test_a_run_comes_back_to_its_cases(tmp_path):
    run = make_run(tmp_path, brief=True)
    released, broken = [], []
    later = lambda x: F.softplus(x) * (1.001 if broken else 1.0)  # noqa: E731
    cases = [softplus_case({"twin": F.softplus}), softplus_case({"scaled later": later}, "again")]
    run.cases("test", cases)
    run.close(lambda: released.append(True))
    once = {r["id"]: r for r in run.results.data["rows"]}
    assert all(r["status"] == "ok" for r in once.values()) and not released
    kept = list(run.kept)
    assert [m.case for m in kept] == cases and all(m.runners for m in kept)
    broken.append(True)
    run.revisit()
    twice = {r["id"]: r for r in run.results.data["rows"]}
    assert twice.keys() == once.keys() and released and not run.kept and not any(m.runners for m in kept)
    before, twin = (rows["test op=softplus / twin"] for rows in (once, twice))
    assert twin["ratio"]["visits"] == 2 and "visits" not in before["ratio"]
    assert twin["time_s"]["samples"] > before["time_s"]["samples"]
    # the answer of this contender is wrong in the second visit, so its time from the first visit is dropped too
    assert twice["test op=again / scaled later"]["status"] == "wrong"


def test_backward_alone_is_timed_in_both_visits(tmp_path):
    run = make_run(tmp_path, brief=True)
    run.cases("test", [bn_relu_dropout.case(run, (2, 8, 16), "backward", False, False)])
    run.revisit()
    found = run.results.data["rows"]
    assert len(found) == 3 and [r["status"] for r in found] == ["ok"] * 3, [r.get("why") for r in found]
    assert all(r["ratio"]["visits"] == 2 for r in found if not r["ours"])


def test_a_case_takes_its_own_rounds_and_share_in_both_visits(tmp_path):
    run = make_run(tmp_path, brief=True)
    # With so wide a target, a case ends after `min_rounds` rounds.
    run.effort = Effort(seconds=60.0, min_rounds=4, max_rounds=20, target=1e9)
    changes = {"softplus": {}, "more": {"rounds": 12}, "less": {"share": 1e-9}}
    run.cases("test", [softplus_case({"twin": F.softplus}, op, **change) for op, change in changes.items()])
    run.revisit()
    pairs = {r["key"]["op"]: r["ratio"]["pairs"] for r in run.results.data["rows"] if "ratio" in r}
    assert pairs == {"softplus": 2 * 4, "more": 2 * 12, "less": 2 * 1}
    assert (run.effort.at_most(1.0).seconds, run.effort.at_most(90.0)) == (1.0, run.effort)


@pytest.mark.parametrize(
    ("round_s", "rounds", "warm_ups"), [(0.3, 6, 2), (0.9, 4, 2), (2.0, 3, 1), (4.0, 3, 1), (10.0, 1, 1)]
)
def test_rounds_that_take_long_are_few_and_their_rows_say_so(round_s, rounds, warm_ups, run, monkeypatch):
    now = itertools.count(0.0, round_s)  # each reading of the clock is `round_s` later than the one before
    for module in (checking, timing):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    ran = []
    run.effort = Effort(seconds=1.0, min_rounds=6, max_rounds=6, target=0.0)
    case = softplus_case({"eager": lambda x: ran.append(1) or F.softplus(x)})
    m = Measurement(case, CPU)
    checking.prepare(m)
    assert len(ran) == len(case.seeds) + warm_ups
    monkeypatch.setattr(devices, "synchronize", lambda device: None)
    ran.clear()
    checking.prepare(Measurement(case, torch.device("cuda")))
    assert len(ran) == len(case.seeds) + 2, "a GPU's graph is captured in the second run"
    found = timing.measure(m, run.effort)
    assert found[1]["ratio"]["pairs"] == found[0]["time_s"]["samples"] == rounds
    assert [row.get("hurried", False) for row in found] == [rounds < 6] * 2
    assert words.marks(found[0]) == (" †" if rounds < 6 else "")
    assert (words.HURRIED in words.notes(found)) == (rounds < 6)


def test_convs_in_fp16_on_a_cpu_are_one_utterance_checked_once_before(run):
    for device, dtype, size, seeds in (
        ("cpu", torch.float16, (1, 104), (1,)),
        ("cpu", torch.bfloat16, (2, 400), (1, 2)),
        ("cuda", torch.float16, (32, 832), (1, 2)),
    ):
        of = dataclasses.replace(run, device=torch.device(device), dtype=dtype)
        (case,), *_ = by_layer.cases("conv1d", of, "forward")
        assert common.size(of) == size and case.seeds == seeds
        assert case.key["shape"].startswith(f"({size[0]}, ") and case.key["shape"].endswith(f", {size[1]})")


def test_quantiles():
    assert ratios.summary([4.0, 1.0, 3.0, 2.0], 1)["p50"] == 2.5 and ratios.summary([5.0], 1)["p99"] == 5.0
    s = ratios.summary([1.0, 2.0, 3.0, 4.0, 5.0], 1)
    assert s["median"] == s["p50"] == 3.0 and s["p20"] == pytest.approx(1.8) and s["min"] == 1.0


def test_run_cut_off_keeps_its_rows_and_resumes(run):
    def cases(later):
        made = [softplus_case({"eager": F.softplus}, f"softplus{i}") for i in range(3)]
        made[1] = dataclasses.replace(made[1], contenders=[*made[1].contenders, Contender("later", later)])
        return made

    with pytest.raises(KeyboardInterrupt):
        run.cases("test", cases(raising(KeyboardInterrupt())))  # while the second case is prepared
    on_disk = written(run)
    assert {r["key"]["op"] for r in on_disk["rows"]} == {"softplus0"} and not on_disk["finished"]

    run, built = again(run), []
    rows = run.cases("test", cases(lambda: built.append(1) or Runner(lambda: None, lambda: {})))
    assert {r["key"]["op"] for r in rows} == {"softplus1", "softplus2"} and built == [1]
    assert {r["key"]["op"] for r in written(run)["rows"]} == {"softplus0", "softplus1", "softplus2"}
    run.results.data["arguments"] = {"backend": "reference", "dtype": "None"}
    run.results.write()
    for other in (
        HEADER | {"machine": HEADER["machine"] | {"commit": "another"}},
        HEADER | {"arguments": {"backend": "cpu", "dtype": "None"}},
        HEADER | {"arguments": {"backend": "reference", "dtype": "None", "fp32_precision": "ieee"}},
    ):
        assert not result_file.unfinished(run.results.path, other)
        assert not result_file.Results(run.results.path, other, resume=True).data["rows"]


def test_deadline_stops_the_run(tmp_path):
    run = make_run(tmp_path, deadline=0.0)
    assert run.out_of_time() and run.cases("test", [softplus_case({})]) == []


# ------------------------------------------------------------------ cuDNN searches only where contenders run


@pytest.fixture
def searching():
    """Sets cuDNN's flag for its search (`torch.backends.cudnn.benchmark`), as on a GPU. On a CPU it has no effect."""
    cudnn_search.on(CUDA)
    assert searches()
    yield
    cudnn_search.on(CPU)
    assert not searches()


def searches() -> bool:
    return torch.backends.cudnn.benchmark


def test_contenders_are_searched_for_and_answers_are_not(searching):
    seen: dict[str, set[bool]] = {"theirs": set(), "answers": set()}

    def spy(name: str, function):
        return lambda *a: seen[name].add(searches()) or function(*a)

    case = softplus_case({"eager": spy("theirs", F.softplus)})
    answers = {name: spy("answers", getattr(case, name)) for name in ("reference", "low")}
    timed(dataclasses.replace(case, **answers))
    assert seen == {"theirs": {True}, "answers": {False}} and searches()


def test_a_search_goes_on_after_an_answer_that_failed(searching):
    m = Measurement(dataclasses.replace(softplus_case({}), reference=lambda: 1 / 0), CPU)
    checking.prepare(m)
    assert m.failed and searches()


@pytest.mark.parametrize("judged_at", [(1, 64), (2, 64)])
def test_a_step_is_searched_for_at_the_batch_that_is_timed(judged_at, searching, tmp_path, monkeypatch):
    """Shows that cuDNN searches in the check if the check has the timed batch size. The timed calls would be too
    late, because cuDNN searches only in the first call with a shape."""
    monkeypatch.setattr(train, "judged_size", lambda *_: judged_at)
    runner = train.case(make_run(tmp_path, rivals="eager"), "small", 2, 64, "forward+backward").contenders[1].build()
    seen = spied(monkeypatch, train.Batch, "loss", lambda *_: searches())
    runner.outputs()
    runner.run()
    assert seen == [judged_at == (2, 64), True]


def test_bytes_and_launches_are_counted_without_a_search(searching, tmp_path, monkeypatch):
    run, seen = make_run(tmp_path), []
    monkeypatch.setattr(memory, "measure", lambda *_: seen.append(searches()) or [])
    memory.main(run, (("small", 1, 32),))
    monkeypatch.setattr(launches, "main", lambda run: seen.append(searches()))
    agenda.all_launches(run)
    assert seen == [False, False] and searches()
