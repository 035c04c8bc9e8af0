"""Compares the faces of the prefix beam search with the definition, and the definition with sums over all CTC paths."""

import itertools
import math
import random
from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
from conftest import assert_raises, make_face, raising
from language_models import needs_native, random_arpa

from jasper_fast import beam_search
from jasper_fast.kernels.prefix_beam import cpu_impl, reference
from jasper_fast.lm import faces
from jasper_fast.lm.align import best_path
from jasper_fast.lm.symbols import SymbolLM, tokens
from jasper_fast.speech.decoding import NotFinite, greedy_decode
from jasper_fast.speech.text import Vocabulary


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns n-grams of symbols by (number of labels, order). Those of order 2 do not list the label "a"."""
    folder, rng = tmp_path_factory.mktemp("lm"), random.Random(3)
    made = {}
    for labels, order in itertools.product((" ", " a", " ab'", " abcdef"), (1, 2, 4)):
        vocabulary = Vocabulary(labels)
        listed = [t for t in tokens(vocabulary) if order != 2 or t != "a"]
        path = random_arpa(folder / f"{len(labels)}.{order}", listed, order, rng, unknown=order != 4)
        made[len(labels), order] = SymbolLM(path, vocabulary)
    return made


def draw(rng: random.Random, case: int, models):
    """Draws log-probs, lengths, a beam, a number of results, and an n-gram or None. Depending on ``case``, log-probs
    are flat or sharp, and have ties, repeated frames or impossible classes."""
    labels, kind = rng.choice((1, 2, 4, 7)), case % 5
    count, frames = rng.choice((1, 2, 3)), rng.choice((0, 1, 1, 2, 5, 9, 12))
    scores = torch.randn(count, frames, labels + 1) * (0.2, 2.0, 8.0, 3.0, 2.0)[kind]
    if kind == 3:
        scores = scores.round()
    if frames > 1 and case % 2:
        scores[:, 1::2] = scores[:, : frames // 2 * 2 : 2]  # pairs of equal frames, which repeat symbols
    log_probs = scores.log_softmax(-1)
    if kind == 4:
        log_probs = log_probs.masked_fill(torch.rand_like(log_probs) < 0.3, -math.inf)
        log_probs[..., 0] = log_probs[..., 0].clamp(min=-3.0)
    lengths = torch.tensor([rng.choice((0, 1, frames, frames, rng.randint(0, frames))) for _ in range(count)])
    beam = rng.choice((1, 2, 3, 8, 17, 64))
    lm = models[labels, rng.choice((1, 2, 4))].ngram if case % 3 else None
    return log_probs, lengths.clamp(max=frames), beam, min(beam, 4), lm


@needs_native
@pytest.mark.slow
def test_the_cpu_face_equals_the_definition_on_500_cases(models):
    rng = random.Random(0)
    for case in range(500):
        *given, lm = draw(rng, case, models)
        weights = (rng.choice((0.3, 1.0, 2.3)), rng.choice((-0.5, 0.0, 0.7))) if lm else (0.0, rng.choice((0.0, 0.4)))
        want, got = (face.search(*given, lm, *weights) for face in (reference, cpu_impl))
        assert all(map(torch.equal, want, got)), case


@pytest.mark.slow
def test_the_triton_face_equals_the_definition(models):
    """Scores may differ by the rounding of exp and log."""
    face = make_face("triton")
    rng = random.Random(5)
    for case in range(9):
        log_probs, *settings = draw(rng, case, models)
        settings += (0.8, 0.3) if settings[-1] else (0.0, -0.2)
        want = reference.search(log_probs, *settings)
        got = [found.cpu() for found in face.load("prefix_beam").search(log_probs.to(face.device), *settings)]
        assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1]), (case, want, got)
        torch.testing.assert_close(got[2], want[2], rtol=0, atol=1e-9)
    # 200 results are requested, more than the 128 prefixes that the face has places for
    missing = face.load("prefix_beam").search(log_probs.to(face.device), settings[0], 1, 200)[1:]
    assert all((x[:, 1:] == nothing).all() for x, nothing in zip(missing, (-1, -math.inf), strict=True))


@pytest.mark.parametrize("name", ["reference", "cpu", "triton"])
def test_a_nan_counts_as_an_impossible_class(name):
    """In two of five frames all classes but one are NaN. The results equal those with -inf in place of NaN."""
    face, log_probs = make_face(name), torch.randn(1, 5, 4).log_softmax(-1)
    given = torch.tensor([5]), 3, 3
    broken = torch.zeros(1, 5, 4, dtype=torch.bool).index_fill(1, torch.tensor([1, 3]), True)
    broken[..., 0] = False
    want = reference.search(log_probs.masked_fill(broken, -math.inf), *given)
    got = face.load("prefix_beam").search(log_probs.masked_fill(broken, math.nan).to(face.device), *given)
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(g.cpu(), w, rtol=0, atol=1e-9)


def test_the_triton_face_says_what_it_cannot_do():
    triton_impl = pytest.importorskip("jasper_fast.kernels.prefix_beam.triton_impl")
    log_probs, lengths = torch.zeros(1, 3, 29).log_softmax(-1), torch.tensor([3])
    assert triton_impl.why_not(29, 128, None, None) is None
    assert_raises((
        (lambda: beam_search(log_probs, lengths, Vocabulary(), beam=129, backend="triton"), "at most beam 128"),
        (lambda: beam_search(log_probs, lengths, Vocabulary(), hot_words={"a": 1.0}, backend="triton"), "no words"),
        (lambda: triton_impl.search(torch.zeros(1, 3, 33), lengths, 8, 1), "32 classes, not 8 and 33"),
    ))  # fmt: skip


@pytest.mark.parametrize("broken", ["right", "wrong", "dead"])
def test_triton_is_used_where_it_is_right(broken, monkeypatch):
    triton_impl = pytest.importorskip("jasper_fast.kernels.prefix_beam.triton_impl")
    symbols, counts, scores = torch.arange(9), torch.arange(3), torch.rand(3).double()
    monkeypatch.setattr(reference, "search", lambda *_: (symbols, counts, scores))
    answers = {"right": lambda *_: (symbols, counts, scores), "wrong": lambda *_: (symbols, counts, scores + 1)}
    monkeypatch.setattr(triton_impl, "search", answers.get(broken, raising(RuntimeError("no such\ninstruction"))))
    warned = pytest.warns(UserWarning, match="differ from the definition's|no such instruction")
    with warned if broken != "right" else nullcontext():
        assert faces.trusted.__wrapped__(torch.device("cpu")) is (broken == "right")


def collapse(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    return tuple(c for c, _ in itertools.groupby(path) if c != blank)


def test_a_wide_beam_sums_all_paths():
    vocabulary = Vocabulary("ab")
    for frames in range(5):
        log_probs = torch.randn(1, frames, 3).log_softmax(-1)
        want: dict[tuple[int, ...], float] = defaultdict(float)
        for path in itertools.product(range(3), repeat=frames):
            want[collapse(path, 2)] += math.exp(sum(log_probs[0, t, c].item() for t, c in enumerate(path)))
        (found,) = beam_search(log_probs, torch.tensor([frames]), vocabulary, beam=200, n_best=200)
        assert {h.symbols: math.exp(h.score) for h in found} == pytest.approx(want)
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


def test_a_score_is_what_the_docstring_says(models):
    lm, vocabulary = models[4, 4], Vocabulary(" ab'")
    log_probs, lengths = torch.randn(1, 6, 5).log_softmax(-1), torch.tensor([6])
    (found,) = beam_search(log_probs, lengths, vocabulary, beam=64, lm=lm, alpha=1.7, beta=0.3, n_best=10)
    for hypothesis in found:
        state, total = lm.ngram.start, hypothesis.log_prob
        for symbol in hypothesis.symbols:
            log10, state = reference._arc(lm.ngram, state, symbol)
            total += 1.7 * log10 + 0.3
        total += 1.7 * reference._arc(lm.ngram, state, vocabulary.blank)[0]
        assert hypothesis.score == pytest.approx(total, abs=1e-9)
        assert hypothesis.text == vocabulary.decode(hypothesis.symbols)


def test_searches_find_more_probable_texts_than_greedy():
    """A wide beam never finds a less probable text than greedy decoding. Beam 1 finds a more probable text more
    than twice as often as a less probable one."""
    vocabulary, lengths = Vocabulary(" abc"), torch.full((40,), 5)
    log_probs = torch.randn(40, 5, 5).log_softmax(-1)
    greedy = greedy_decode(log_probs, lengths, vocabulary)
    exact = beam_search(log_probs, lengths, vocabulary, beam=1400, n_best=1400)  # keeps every prefix
    probability = [{h.text: h.log_prob for h in every} for every in exact]
    gain = {}
    for beam in (1, 128):
        found = beam_search(log_probs, lengths, vocabulary, beam=beam)
        gain[beam] = [p[h[0].text] - p[g] for p, h, g in zip(probability, found, greedy, strict=True)]
    assert min(gain[128]) >= -1e-9
    assert sum(gain[1]) > 0 and sum(g > 1e-9 for g in gain[1]) > 2 * sum(g < -1e-9 for g in gain[1])


def test_where_one_path_has_it_all_the_search_is_greedy():
    log_probs = (torch.randn(8, 40, 29) * 60).log_softmax(-1)
    lengths = torch.randint(0, 41, (8,))
    for beam in (1, 16):
        found = beam_search(log_probs, lengths, Vocabulary(), beam=beam)
        assert [h[0].text for h in found] == greedy_decode(log_probs, lengths, Vocabulary())


@needs_native
def test_threads_dtypes_and_strides_change_nothing():
    log_probs, lengths = torch.randn(5, 60, 29).log_softmax(-1).half(), torch.tensor([60, 7, 0, 33, 60])
    want = beam_search(log_probs.float(), lengths, Vocabulary(), beam=32, n_best=3)
    turned = log_probs.transpose(1, 2).contiguous().transpose(1, 2)
    torch.set_num_threads(3)
    assert beam_search(turned, lengths.int(), Vocabulary(), beam=32, n_best=3) == want
    torch.set_num_threads(1)
    alone = [beam_search(log_probs[i : i + 1, :n], lengths[i : i + 1], Vocabulary(), beam=32, n_best=3)[0]
             for i, n in enumerate(lengths.tolist())]  # fmt: skip
    assert alone == want


@needs_native
@pytest.mark.slow
def test_prefixes_that_no_longer_matter_are_cleared_away():
    """The C++ face removes old prefixes once there are more than 16,384; this search makes about 19,000. Some of the
    prefixes that remain leave the beam and come back later."""
    log_probs, lengths = torch.randn(1, 60, 9).log_softmax(-1), torch.tensor([60])
    found = [beam_search(log_probs, lengths, Vocabulary("abcdefgh"), beam=512, n_best=512, backend=face)
             for face in ("cpu", "reference")]  # fmt: skip
    assert found[0] == found[1]


def test_bad_input_is_named(models):
    v, log_probs, lengths = Vocabulary(" ab'"), torch.zeros(2, 3, 5).log_softmax(-1), torch.tensor([3, 2])
    assert_raises((
        (lambda: beam_search(log_probs[0], lengths, v), r"\(N, T, V\)"),
        (lambda: beam_search(log_probs, lengths, Vocabulary()), "5 classes, but the vocabulary has 29"),
        (lambda: beam_search(log_probs, torch.tensor([4, 0]), v), r"lengths must be in 0\.\.3"),
        (lambda: beam_search(log_probs, torch.tensor([-1, 0]), v), r"lengths must be in 0\.\.3"),
        (lambda: beam_search(log_probs, lengths, v, beam=0), "beam 0"),
        (lambda: beam_search(log_probs, lengths, v, n_best=-1), "n_best -1"),
        (lambda: beam_search(log_probs, lengths, v, alpha=-1.0), "alpha -1"),
        (lambda: beam_search(log_probs, lengths, v, beta=math.nan), "beta nan"),
        (lambda: beam_search(log_probs, lengths, v, backend="cuda"), "backend 'cuda' must be one of"),
        (lambda: beam_search(log_probs, lengths, v, lm=models[7, 2]), "another vocabulary"),
    ))  # fmt: skip
    for broken in (math.nan, math.inf):
        spoilt = log_probs.clone()
        spoilt[1, 2, 0] = broken
        assert len(beam_search(spoilt, lengths, v)) == 2  # beyond the utterance's length, so it does not matter
        spoilt[1, 1, 0] = broken
        with pytest.raises(NotFinite, match=r"items \[1\]"):
            beam_search(spoilt, lengths, v)
    assert beam_search(log_probs[:0], lengths[:0], v) == []


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
def test_an_utterance_that_nothing_fits_has_an_empty_text(backend):
    log_probs = torch.tensor([[[0.0, -50.0, -math.inf], [-math.inf, 0.0, -math.inf]]])
    (found,) = beam_search(log_probs, torch.tensor([2]), Vocabulary("ab"), beam=1, beta=-1e308, backend=backend)
    assert [(h.text, h.score) for h in found] == [("", -math.inf)]


def test_alignment_is_the_best_path():
    for frames, symbols in itertools.product((3, 4, 5), ((), (0,), (0, 0), (1, 0), (0, 1, 1))):
        fitting = [p for p in itertools.product(range(3), repeat=frames) if collapse(p, 2) == symbols]
        for log_probs in torch.randn(5, frames, 3).log_softmax(-1).numpy():
            path = best_path(log_probs, symbols)
            total = {p: sum(log_probs[t, c].item() for t, c in enumerate(p)) for p in fitting}
            assert total[tuple(path)] == pytest.approx(max(total.values())) if fitting else path is None
    assert best_path(log_probs[:0], ()).tolist() == [] and best_path(log_probs[:0], (1,)) is None
