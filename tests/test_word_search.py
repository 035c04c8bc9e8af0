"""Tests the beam search with a word n-gram by flashlight: scores, lexicons, transcripts, and errors."""

import multiprocessing
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_raises
from language_models import hear, random_arpa

from jasper_fast.lm import words
from jasper_fast.lm.arpa import LanguageModelError
from jasper_fast.lm.decoders import decoder, load_lm
from jasper_fast.lm.pool import Pool
from jasper_fast.lm.symbols import SymbolLM
from jasper_fast.lm.words import WordLM, WordSearch, word_lm
from jasper_fast.speech.text import Vocabulary

pytest.importorskip("flashlight.lib.text.decoder", reason="flashlight-text is not installed")
kenlm = pytest.importorskip("kenlm", reason="ufal-kenlm is not installed")

V = Vocabulary()
WORDS = ["the", "cat", "sat", "on", "a", "mat", "then", "ran"]


@pytest.fixture
def arpa(tmp_path):
    return random_arpa(tmp_path / "lm.arpa", WORDS, 3, random.Random(0))


def posteriors(text: str, sharp: float = 4.0) -> torch.Tensor:
    return hear(V, text, sharp, seed=len(text), times=2)


def ctc(log_probs: torch.Tensor, text: str) -> float:
    lengths = torch.tensor([len(log_probs)]), torch.tensor([len(text)])
    return -torch.nn.functional.ctc_loss(
        log_probs[:, None], torch.tensor([V.encode(text)]), *lengths, V.blank, "sum"
    ).item()


def test_scores_are_in_the_papers_scale(arpa):
    """A score is log p_CTC + alpha * log10 p_LM + beta * words. flashlight's p_CTC of a text includes that of the text
    with doubled spaces."""
    log_probs, model = posteriors("the cat sat on a mat"), kenlm.Model(str(arpa))
    for alpha, beta in ((0.0, 0.0), (2.0, -0.2), (1.0, 0.5)):
        found = WordSearch(word_lm(arpa, V), beam=512, alpha=alpha, beta=beta, n_best=4)(log_probs.numpy())
        assert len({f.text for f in found}) == 4
        if not alpha:
            assert found[0].text == "the cat sat on a mat" and found[0].log_prob - ctc(log_probs, found[0].text) < 0.7
        for f in found:
            assert f.score == pytest.approx(
                f.log_prob + alpha * model.score(f.text) + beta * len(f.text.split()), abs=1e-4
            )
            assert f.log_prob > ctc(log_probs, f.text) - 1e-3
        assert [f.score for f in found] == sorted((f.score for f in found), reverse=True)


def test_answers_are_the_librarys_own(arpa):
    from flashlight.lib.text import decoder as flashlight
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    log_probs = posteriors("then the cat ran").numpy()
    model, trie, space = KenLM(str(arpa), Dictionary([*WORDS, "<unk>"])), flashlight.Trie(V.n_classes, 0), 0
    for i, word in enumerate(WORDS):
        trie.insert([*V.encode(word), space], i, model.score(model.start(False), i)[1])
    trie.smear(flashlight.SmearingMode.MAX)
    options = flashlight.LexiconDecoderOptions(
        64, 29, 50.0, 2.0, -0.2, -np.inf, 0.0, True, flashlight.CriterionType.CTC
    )
    search = flashlight.LexiconDecoder(options, trie, model, space, V.blank, len(WORDS), [], False)
    framed = np.vstack([log_probs, np.where(np.arange(29) == space, 0, -1e30)]).astype(np.float32)
    want = {}
    for result in search.decode(framed.ctypes.data, *framed.shape):
        want.setdefault(" ".join(WORDS[w] for w in result.words if w >= 0), result.score)
    found = WordSearch(word_lm(arpa, V), beam=64, alpha=2.0, beta=-0.2, n_best=5)(log_probs)
    assert {f.text: f.score for f in found} == pytest.approx(dict([*want.items()][:5]), abs=1e-4)


def test_lexicons_close_the_vocabulary(arpa, tmp_path):
    lexicon = tmp_path / "lexicon.txt"
    lexicon.write_text("the\nCAT c a t |\n\nsat\tr a n\nwaterl\u00f6\u00f6\n<unk>\n")
    lm = word_lm(arpa, V, lexicon)
    assert [(e.token, e.text) for e in lm.entries] == [("the", "the"), ("CAT", "cat"), ("sat", "ran")]
    assert lm.left_out == ("waterl\u00f6\u00f6",)
    search = WordSearch(lm, beam=64, alpha=0.0, beta=0.0)
    assert [f.text for f in search(posteriors("then cat ran").numpy())] == ["the cat ran"]
    assert search(posteriors("the")[:0].numpy())[0].text == ""


def test_a_model_in_capitals_writes_small_letters(tmp_path):
    arpa = random_arpa(tmp_path / "lm.arpa", [w.upper() for w in WORDS], 2, random.Random(1))
    assert WordSearch(word_lm(arpa, V), 64, 1.0, 0.0)(posteriors("a cat sat").numpy())[0].text == "a cat sat"


def test_a_decoder_gives_transcripts_with_times(arpa):
    texts = ["the cat sat", "a mat", ""]
    rows = [posteriors(t, 6.0) if t else torch.zeros(0, 29) for t in texts]
    log_probs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(r) for r in rows])
    made = decoder(V, load_lm(arpa, V), beam=32, n_best=3, processes=2)
    found = made.begin(log_probs, lengths, 0.02)()
    again = [made.begin(log_probs[i : i + 1], lengths[i : i + 1], 0.02)()[0] for i in range(3)]
    made.close()
    assert found == again and [t.text for t in found] == texts
    assert [w.text for w in found[0].words] == ["the", "cat", "sat"] and len(found[0].hypotheses) == 3
    assert [round(w.start, 3) for w in found[0].words] == [0.0, 0.24, 0.48]
    assert all(0 < w.confidence <= 1 for w in found[0].words)


def test_which_model_a_file_holds(arpa, tmp_path):
    symbols = random_arpa(tmp_path / "symbols.arpa", ["<space>", "a", "b"], 2, random.Random(0))
    assert isinstance(load_lm(arpa, V), WordLM) and isinstance(load_lm(symbols, V), SymbolLM)
    with pytest.raises(LanguageModelError, match="labels that are characters"):
        load_lm(arpa, Vocabulary(["one", "two"]))
    words = random_arpa(tmp_path / "words.arpa", ["one", "two"], 2, random.Random(0))
    assert isinstance(load_lm(words, Vocabulary(["one", "two"])), SymbolLM)


MAGIC = b"mmap lm http://kheafield.com/code format version 5\n\x00"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: b"", "is empty"),
        (lambda text: text[: len(text) // 2], "KenLM cannot read it"),
        (lambda text: text.replace(b"\tcat", b"\tthe"), "KenLM cannot read it"),
        (lambda text: text.replace(b"ngram 3=", b"ngram 3=99999"), "the file is too short for them"),
        (lambda text: text.replace(b"</s>", b"xx"), "missing </s>"),
        (lambda text: text.replace(b"\tt", b"\t\xff"), "not UTF-8"),
        (lambda text: MAGIC, "words of a KenLM binary cannot be listed"),
        (lambda text: text.replace(b"cat", b"c\xc3\xa4t").replace(b"the", b"th\xc3\xa4"), None),
    ],
)
def test_broken_models_are_one_line(change, message, arpa):
    arpa.write_bytes(change(arpa.read_bytes()))
    if message is None:  # words that cannot be spelt are left out, and the model works
        assert len(WordSearch(word_lm(arpa, V), 8, 1.0, 0.0).entries) == len(WORDS) - 3
        return
    with pytest.raises(LanguageModelError, match=message) as error:
        WordSearch(word_lm(arpa, V), 8, 1.0, 0.0)
    assert "\n" not in str(error.value) and str(arpa) in str(error.value)


def test_broken_binaries_and_lexicons_are_one_line(arpa, tmp_path):
    lexicon, binary = tmp_path / "lexicon.txt", tmp_path / "lm.bin"
    lexicon.write_text("cat\n")
    for content in (MAGIC, MAGIC + bytes(4000), MAGIC + random.Random(0).randbytes(4000)):
        binary.write_bytes(content)
        with pytest.raises(LanguageModelError, match=r"lm\.bin: KenLM cannot read it"):
            WordSearch(word_lm(binary, V, lexicon), 8, 1.0, 0.0)
    for content, message in ((b"", "is empty"), (b"\xff\xfe", "cannot be read"), ("ö ö ö\n".encode(), "be spelt")):
        lexicon.write_bytes(content)
        with pytest.raises(LanguageModelError, match=message):
            word_lm(arpa, V, lexicon)
    unigrams = random_arpa(tmp_path / "uni.arpa", WORDS, 1, random.Random(0))
    assert_raises((
        (lambda: word_lm(tmp_path / "gone.arpa", V), "no such language model"),
        (lambda: word_lm(unigrams, V), "has only 1-grams"),
    ), LanguageModelError)  # fmt: skip


def test_a_python_without_wheels_is_told(arpa, monkeypatch):
    monkeypatch.setattr(words, "sys", SimpleNamespace(version_info=(3, 13)))
    monkeypatch.setattr(words, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    with pytest.raises(LanguageModelError, match=r"Python 3\.11 and 3\.12; use one"):
        WordSearch(word_lm(arpa, V), 8, 1.0, 0.0)


class Killer:
    """Ends the process that unpickles it."""

    path = "deadly.bin"

    def __reduce__(self):
        return os._exit, (11,)


def test_a_model_that_takes_its_process_down_is_one_line(arpa):
    before = {*multiprocessing.active_children()}
    with pytest.raises(LanguageModelError, match=r"deadly\.bin: the process that searches with this model was ended"):
        Pool(Killer(), 1)
    with pytest.raises(LanguageModelError, match="KenLM cannot read it"):
        lm = word_lm(arpa, V)
        arpa.write_bytes(MAGIC)
        Pool(lm, 1, beam=8, alpha=1.0, beta=0.0)
    assert {*multiprocessing.active_children()} <= before
