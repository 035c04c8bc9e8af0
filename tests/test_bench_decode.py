"""`python -m bench decode` runs every contender, and a contender with a wrong answer gets no number."""

import pytest
from bench_runs import make_run, python
from standins import wrap

from jasper_fast.bench.cases import decode, latency
from jasper_fast.kernels import native
from jasper_fast.kernels.prefix_beam import cpu_impl

pytestmark = pytest.mark.skipif(not native.cpu_available(), reason="the native CPU library is not built")


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(decode, "text", lambda: [["ab", "cad"], ["bad", "ab"]] * 20)
    monkeypatch.setattr(decode, "FRAMES", 30)
    monkeypatch.setattr(decode, "CHECKED", 20)


@pytest.mark.parametrize("lm", ["none", *(pytest.param(lm, marks=pytest.mark.slow) for lm in ("symbols", "words"))])
@pytest.mark.parametrize("kind", [*decode.SHARP])
def test_searches_answer(kind, lm, short, tmp_path):
    ours, flashlight = make_run(tmp_path, "auto").cases("decode", [decode.search_case(kind, 32, lm)])
    assert ours["contender"] == "jasper_fast" and ours["status"] == "ok", ours.get("why")
    assert ours["items_per_s"] > 0
    assert flashlight["status"] in ("ok", "absent"), flashlight.get("why")


@pytest.mark.slow
def test_the_language_models_are_deleted_when_the_process_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    python(
        "from jasper_fast.bench.cases import decode\n"
        "decode.text = lambda: [['ab', 'cad'], ['bad', 'ab']] * 20\n"
        "assert decode.language_model('symbols').path"
    )
    assert not list(tmp_path.glob("jasper-fast-bench-*"))


def test_a_wrong_answer_has_no_number(short, tmp_path, monkeypatch):
    def wrong(right, *of):
        symbols, counts, scores = right(*of)
        return symbols, counts, scores - 1e-3

    wrap(monkeypatch, cpu_impl, "search", wrong)
    rows = make_run(tmp_path, "auto").cases("decode", [decode.search_case("unsure", 8, "none")])
    assert [row["status"] for row in rows if row["ours"]] == ["wrong"]


@pytest.mark.slow
def test_the_share_of_the_search_is_told(tmp_path):
    run = make_run(tmp_path, "auto")
    rows = run.cases("decode", [decode.whole_case(latency.Models(run, "small"), run, "small", 2.0, 16, "symbols")])
    assert [(row["contender"], row["status"]) for row in rows] == [("jasper_fast", "ok"), ("greedy", "ok")]
    assert rows[1]["ratio"]["median"] > 0
