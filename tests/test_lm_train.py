"""Compares the n-grams of `lm train` with the definition and with KenLM, and tests its limits and errors."""

import gzip
import math
import random

import pytest
from conftest import assert_raises
from kneser_ney import KneserNey
from language_models import needs_native

from jasper_fast.lm.arpa import Arpa
from jasper_fast.lm.symbols import SymbolLM
from jasper_fast.lm.train import train
from jasper_fast.speech.text import Vocabulary

pytestmark = needs_native


def corpus(rng: random.Random, lines: int | None = None) -> list[list[str]]:
    """Returns random sentences. A few words are frequent, and some sentences occur twice."""
    words = [f"w{i}" for i in range(rng.randint(1, 12))]
    weights = [1 / (i + 1) for i in range(len(words))]
    made = [rng.choices(words, weights, k=rng.randint(1, 9)) for _ in range(lines or rng.randint(1, 40))]
    return made + [line for line in made if rng.random() < 0.2]


def write(path, sentences):
    path.write_text("\n".join(" ".join(s) for s in sentences) + "\n\n")
    return path


def listed(path) -> dict[tuple[str, ...], tuple[float, float]]:
    return {words: (log10, back_off) for log10, words, back_off in Arpa(path)}


def prunings(order: int, rng: random.Random) -> list[int]:
    return [0, *sorted(rng.choice((0, 0, 1, 2)) for _ in range(order - 1))]


@pytest.mark.slow
def test_numbers_are_the_definitions_on_200_corpora(tmp_path):
    rng, own_discounts = random.Random(0), 0
    for case in range(200):
        order = case % 6 + 1
        sentences, prune = corpus(rng), prunings(order, rng) if case % 2 else []
        made = train([write(tmp_path / "text", sentences)], tmp_path / "lm.arpa", order, prune=prune)
        want, found = KneserNey(sentences, order, prune), listed(tmp_path / "lm.arpa")
        assert found.keys() == set().union(*want.kept) | {("<unk>",), ("<s>",)}
        assert [o.ngrams for o in made.orders] == Arpa(tmp_path / "lm.arpa").counts
        for gram, (log10, back_off) in found.items():
            if gram != ("<s>",):
                assert log10 == pytest.approx(math.log10(want.p(gram)), abs=1e-6), (case, gram)
            if len(gram) < order and gram != ("<unk>",):
                assert back_off == pytest.approx(math.log10(want.gamma(gram) or 1.0), abs=1e-6), (case, gram)
        for n, entry in enumerate(made.orders, 1):
            assert entry.discounts == pytest.approx(want.discount[n])
            own_discounts += not entry.fallback
        assert made.words == sum(map(len, sentences)) and made.sentences == len(sentences)
    assert own_discounts > 100


@pytest.mark.parametrize("order", [2, 3, 6])
@pytest.mark.parametrize("pruned", [False, True])
def test_probabilities_sum_to_one_through_kenlm(order, pruned, tmp_path):
    kenlm = pytest.importorskip("kenlm", reason="ufal-kenlm is not installed")
    rng = random.Random(order)
    sentences = corpus(rng, 60)
    prune = prunings(order, rng) if pruned else []
    train([write(tmp_path / "text", sentences)], tmp_path / "lm.arpa", order, prune=prune)
    model, want = kenlm.Model(str(tmp_path / "lm.arpa")), KneserNey(sentences, order, prune)
    for _ in range(30):
        context = [rng.choice(["w0", "w1", "w2", "w3", "never"]) for _ in range(rng.randint(0, order))]
        before, after = kenlm.State(), kenlm.State()
        model.BeginSentenceWrite(before)
        for word in context:
            model.BaseScore(before, word, after)
            before, after = after, before
        history = ("<s>", *(w if (w,) in want.times[1] else "<unk>" for w in context))[-(order - 1) :]
        found = {word: 10 ** model.BaseScore(before, word, after) for word in want.vocabulary}
        assert found == pytest.approx({word: want.p((*history, word)) for word in found}, rel=1e-5)
        assert sum(found.values()) == pytest.approx(1.0, abs=1e-5)


def test_memory_that_is_too_small_for_the_text_changes_nothing(tmp_path):
    text = write(tmp_path / "text", corpus(random.Random(1), 3000))
    for name, memory in (("one.arpa", 64 << 20), ("two.arpa", 1)):
        train([text], tmp_path / name, 4, memory=memory, prune=[0, 0, 1])
    assert (tmp_path / "one.arpa").read_bytes() == (tmp_path / "two.arpa").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_characters_and_gzip_and_several_files(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"A  cab\n\nBad\n"))
    (tmp_path / "b").write_text("\tdad\n", encoding="utf-8-sig")
    made = train([tmp_path / "a.gz", tmp_path / "b"], tmp_path / "lm.arpa", 3, characters=True, lower_case=True)
    want, found = KneserNey([["a", "<space>", *"cab"], [*"bad"], [*"dad"]], 3), listed(tmp_path / "lm.arpa")
    assert {g for g in found if len(g) > 1} == set().union(*want.kept[2:])
    assert all(v[0] == pytest.approx(math.log10(want.p(g)), abs=1e-6) for g, v in found.items() if g != ("<s>",))
    assert (made.sentences, made.words, made.vocabulary) == (3, 11, 8)
    assert Arpa(tmp_path / "lm.arpa").order == 3 and SymbolLM(tmp_path / "lm.arpa", Vocabulary()).ngram.start > 0


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (b"", {}, "has no words"),
        (b"\n \n", {}, "has no words"),
        (b"a b\n<s> c\n", {}, "contains <s>"),
        (b"a b\nc\xff\n", {}, "line 2: not UTF-8"),
        (b"a\0b\n", {}, "line 1: holds a null byte"),
        (b"\x1f\x8bnothing", {}, "cannot be read as text"),
        (b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 20, {}, "cannot be read as text"),
        (b"a\n", {"order": 7}, "--order 7"),
        (b"a\n", {"order": 0}, "--order 0"),
        (b"a\n", {"prune": [1]}, "--prune 1:"),
        (b"a\n", {"prune": [0, 2, 1]}, "--prune 0 2 1:"),
        (b"a\n", {"prune": [0, 0, 0, 0]}, "--prune 0 0 0 0:"),
    ],
)
def test_what_cannot_be_trained_is_one_line(content, settings, message, tmp_path):
    (tmp_path / "text").write_bytes(content)
    assert_raises([(lambda: train([tmp_path / "text"], tmp_path / "lm.arpa", **({"order": 3} | settings)), message)])
    assert [p.name for p in tmp_path.iterdir()] == ["text"]
