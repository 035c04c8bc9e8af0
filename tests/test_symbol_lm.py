"""Compares n-grams of symbols from ARPA files with KenLM, and tests the errors for broken files."""

import gzip
import importlib.util
import random
import zlib

import pytest
from conftest import assert_raises
from language_models import random_arpa

from jasper_fast.kernels.prefix_beam import reference
from jasper_fast.lm.arpa import Arpa, LanguageModelError
from jasper_fast.lm.queries import load
from jasper_fast.lm.symbols import SymbolLM, automaton, foreign, tokens
from jasper_fast.speech.text import Vocabulary

V = Vocabulary(" abcd")


def score(lm: SymbolLM, text: str) -> list[float]:
    state, found = lm.ngram.start, []
    for symbol in [*V.encode(text), V.blank]:
        log10, state = reference._arc(lm.ngram, state, symbol)
        found.append(log10)
    return found


@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize("unknown", [True, False])
def test_numbers_are_kenlms(order, unknown, tmp_path):
    kenlm = pytest.importorskip("kenlm", reason="ufal-kenlm is not installed")
    rng = random.Random(order)
    path = random_arpa(tmp_path / "lm.arpa", [t for t in tokens(V) if t != "c"], order, rng, unknown)
    lm, other = SymbolLM(path, V), kenlm.Model(str(path))
    for _ in range(20):
        text = "".join(rng.choice(V.labels) for _ in range(rng.randint(0, 9)))
        words = " ".join(tokens(V)[i] for i in V.encode(text))
        assert score(lm, text) == pytest.approx([s for s, *_ in other.full_scores(words)], abs=1e-4)


def test_gzip_is_read(tmp_path):
    path = random_arpa(tmp_path / "lm.arpa", tokens(V), 3, random.Random(0))
    packed = tmp_path / "lm.arpa.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert score(SymbolLM(packed, V), "a bad cab") == score(SymbolLM(path, V), "a bad cab")
    packed.write_bytes(packed.read_bytes()[:200])
    with pytest.raises(LanguageModelError, match=r"lm\.arpa\.gz: cannot be read"):
        SymbolLM(packed, V)
    whole = GOOD.encode() + b"\n" * (1 << 20)  # long, so that the header is read before the damage
    for text, message in ((b"", "cannot be read as a language model"), (whole, "cannot be read to its end")):
        pack = zlib.compressobj(wbits=31)  # gzip
        packed.write_bytes(pack.compress(text) + pack.flush(zlib.Z_SYNC_FLUSH) + b"\xff" * 20)
        with pytest.raises(LanguageModelError, match=rf"lm\.arpa\.gz: {message} \(Error -3"):
            SymbolLM(packed, V)


def test_only_ascii_spaces_separate_words(tmp_path):
    path, word = tmp_path / "lm.arpa", "1\u00a0000\u00a0"
    path.write_text(GOOD.replace("\ta\t", f"\t{word}\t").replace("<s> a", f"<s> {word}") + "\\end\\\n")
    assert [*Arpa(path)][-1] == (-0.5, ("<s>", word), 0.0)
    if importlib.util.find_spec("kenlm"):
        assert load(path).score(word, eos=False) == pytest.approx(-0.5)


def test_which_vocabulary_a_model_fits(tmp_path):
    path = random_arpa(tmp_path / "lm.arpa", ["<space>", "a", "b"], 2, random.Random(0))
    assert foreign(Arpa(path), V) == [] and foreign(Arpa(path), Vocabulary(" a")) == ["b"]
    with pytest.raises(LanguageModelError, match="'b' is no label"):
        SymbolLM(path, Vocabulary(" a"))


GOOD = (
    "\\data\\\nngram 1=4\nngram 2=1\n\n"
    "\\1-grams:\n-1\t<s>\t-0.5\n-1\t</s>\n-1\ta\t-0.1\n-1\tb\n\n\\2-grams:\n-0.5\t<s> a\n\n"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("hello\n" * 2000, "no .data."),
        ("\\data\\\n", "line 1: the ARPA file ends here"),
        ("\\data\\\nngram 1=a\n\n", "line 2: expected .ngram 1=COUNT., got 'ngram 1=a'"),
        ("\\data\\\nngram 1=\u00b2\n\n", "line 2: expected .ngram 1=COUNT."),
        (f"\\data\\\nngram 1={'9' * 5000}\n\n", "line 2: expected .ngram 1=COUNT."),
        ("\\data\\\n\n", "names no n-grams"),
        ("\\data\\\nngram 1=99999999999\n\n\\1-grams:\n", "the file is too short for them"),
        (GOOD, "the ARPA file ends here"),
        (GOOD.replace("1=4", "1=5") + "\\end\\\n", "the header promises 5"),
        (GOOD.replace("1=4", "1=3") + "\\end\\\n", "expected .2-grams:, got"),
        (GOOD.replace("2=1\n", "2=0\n") + "\\end\\\n", "more 2-grams than the 0"),
        (GOOD.replace("-1\ta", "x\ta") + "\\end\\\n", "line 8: this is no 1-gram"),
        (GOOD.replace("-1\ta", "nan\ta") + "\\end\\\n", "line 8: log10 p nan"),
        (GOOD.replace("-1\ta", "0.5\ta") + "\\end\\\n", "line 8: log10 p 0.5"),
        (GOOD.replace("-0.5\t<s> a", "-0.5\tz a") + "\\end\\\n", "'z' is not among its 1-grams"),
        (GOOD.replace("-0.5\t<s> a", "-0.5\t<s> a b c d") + "\\end\\\n", "line 12: 6 fields"),
        (GOOD.replace("</s>", "c") + "\\end\\\n", "no </s>"),
        (GOOD.replace("-1\tb", "-1\ta") + "\\end\\\n", "'a' is listed twice"),
        (GOOD.replace("\ta", "\t\0") + "\\end\\\n", "no label"),
        (GOOD.replace("\ta", "\t" + "x" * (1 << 20)) + "\\end\\\n", "a line of a megabyte"),
    ],
)
def test_broken_files_are_one_line(text, message, tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_text(text)
    with pytest.raises(LanguageModelError, match=message) as error:
        SymbolLM(path, V)
    assert "\n" not in str(error.value) and "lm.arpa" in str(error.value) and len(str(error.value)) < 300


def test_more_words_than_one_character_can_number(tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_text(GOOD + "\\end\\\n")
    with pytest.raises(LanguageModelError, match=r"lm\.arpa: 1,114,110 words; at most 1,114,109 can be searched"):
        automaton(Arpa(path), [str(i) for i in range(1_114_110)])


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_bytes(b"\\data\\\nngram 1=1\n\n\\1-grams:\n-1\t\xff\xfe\n\\end\\\n")
    assert_raises((
        (lambda: SymbolLM(path, V), "line 5: not UTF-8"),
        (lambda: SymbolLM(tmp_path / "gone", V), "no such language model"),
        (lambda: SymbolLM(tmp_path, V), "cannot be read"),
    ), LanguageModelError)  # fmt: skip
