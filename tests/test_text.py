"""Vocabularies, text normalisation and error rates."""

import pytest

from jasper_fast.speech.metrics import alignment, cer, wer, word_errors
from jasper_fast.speech.numbers import expand_numbers
from jasper_fast.speech.text import UnknownSymbolError, Vocabulary, normalize, normalize_and_lost


def test_default_vocabulary():
    v = Vocabulary()
    assert len(v) == 28 and v.blank == 28 and v.n_classes == 29
    assert v.encode("a z'") == [1, 0, 26, 27]
    assert v.decode([28, 8, 28, 9, 0, 28]) == "hi "
    assert Vocabulary(v.labels) == v and Vocabulary("ab") != v


@pytest.mark.slow
def test_a_vocabulary_of_words():
    v = Vocabulary(["zero", "one", "two"])
    assert v.of_words and v.n_classes == 4
    assert v.encode("two  zero one") == [2, 0, 1]
    assert v.decode([2, 3, 0]) == "two zero"
    assert normalize("Two, 1 - ZERO!", v) == "two one zero"
    with pytest.raises(UnknownSymbolError, match="'ten'"):
        v.encode("one ten")


def test_unknown_symbols_and_classes_are_named():
    with pytest.raises(UnknownSymbolError, match="'H', 'é'"):
        Vocabulary().encode("Hé")
    with pytest.raises(ValueError, match=r"29 is not in 0\.\.28"):
        Vocabulary().decode([29])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b", "a"], "labels 0 and 2 collide: both are 'a'"),
        (["one", "two", "one"], "labels 0 and 2 collide"),
        (["\u00e9", "e\u0301"], "labels 0 and 1 collide"),
        (["a", "th"], "label 1 is 'th'"),
        (["a", "<BLANK>"], "leave out the blank"),
        (["a", ""], "label 1 is ''"),
        ([], "at least one"),
    ],
)
def test_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(labels)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mr. Müller owes $5!", "mister muller owes five dollars"),
        ("It’s “naïve” — isn't it?", "it's naive isn't it"),
        ("Dr. Smith & Co., St. Louis + Ltd.", "doctor smith and company saint louis plus limited"),
        ("  tabs\tand\n lines\u00a0 ", "tabs and lines"),
        ("at 8:30, on the 21st", "at eight thirty on the twenty first"),
        ("£20 or $1,000.50 or $0.05", "twenty pounds or one thousand dollars fifty cents or five cents"),
        ("in 1984, 2007, 1905, 1900 and 2000", "in nineteen eighty four two thousand seven nineteen oh five "
         "nineteen hundred and two thousand"),
        ("agent 007 has 1,234,567", "agent zero zero seven has one million two hundred thirty four thousand five "
         "hundred sixty seven"),
        ("call 5551234567", "call five five five one two three four five six seven"),
        ("pi is 3.14", "pi is three point fourteen"),
        ("...", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_english(text, expected):
    assert normalize(text) == expected
    Vocabulary().encode(expected)


GERMAN = " abcdefghijklmnopqrstuvwxyzäöüß"


@pytest.mark.parametrize(
    ("text", "labels", "english", "expected"),
    [
        ("Die GRÖSSE, naïve 5 Größen", GERMAN, None, "die grösse naive größen"),
        ("5 Mr.", GERMAN, True, "five mister"),
        ("Привет, мир! Ёж", " абвгдеёжзийклмнопрстуфхцчшщъыьэюя", None, "привет мир ёж"),
        ("e\u0301te\u0301", "eté", None, "été"),
        ("Hello 5", " ABCDEFGHIJKLMNOPQRSTUVWXYZ", None, "HELLO FIVE"),
        ("room 101!", " abcdefghijklmnopqrstuvwxyz0123456789", None, "room 101"),
        ("a-b, c", " abc-", None, "a-b c"),
        ("Hello", "Helo", None, "Hello"),
    ],
)
def test_custom_alphabets(text, labels, english, expected):
    assert normalize(text, list(labels), english) == expected


RUSSIAN = " абвгдежзийклмнопрстуфхцчшщъыьэюя"


@pytest.mark.parametrize(
    ("text", "labels", "left", "lost"),
    [
        ("5 яблок", RUSSIAN, "яблок", "5"),
        ("Hello мир", RUSSIAN, "мир", "helo"),
        ("ёлка и Ёж", RUSSIAN, "лка и ж", "ё"),
        ("Мир, да! \u200b«Нет» — №", RUSSIAN, "мир да нет", "№"),
        ("Mr. Müller owes $5 & more!", None, "mister muller owes five dollars and more", ""),
        ("five 5", "efiv ", "five five", ""),
        ("6 ox", " ixo", "ix ox", "s"),
        ("cafe\u0301 straße", " abcdefrst", "cafe strasse", ""),
        ("日本", "xy ", "", "日本"),
    ],
)  # fmt: skip
def test_what_normalisation_drops_is_told(text, labels, left, lost):
    assert normalize_and_lost(text, labels and list(labels)) == (left, list(lost))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0, 1000000 and 1,000,000,000,000,000,000", "zero, one million and one quintillion"),
        ("2345 2100 20000", "twenty-three forty-five twenty-one hundred twenty thousand"),
        ("1st 2nd 3rd 5th 12th 20th 101st 1000th", "first second third fifth twelfth twentieth one hundred and first "
         "one thousandth"),
        ("9" * 40, " ".join(["nine"] * 40)),
        ("9" * 5000, " ".join(["nine"] * 5000)),  # Python refuses to read so many digits as an int
        (f"${'1' * 5000}.01", f"{'one ' * 5000}dollars one cent"),
        (f"{'9' * 40}th", " ".join(["nine"] * 40)),
        ("$1 $2.01 $.50 $1.2.3", "one dollar two dollars one cent fifty cents one point two.three dollars"),
    ],
)  # fmt: skip
def test_numbers(text, expected):
    assert expand_numbers(text) == expected


@pytest.mark.parametrize(
    ("rate", "references", "hypotheses", "expected"),
    [
        (wer, ["a b c"], ["a x c"], 1 / 3),
        (wer, ["a b", "c d"], ["a b", "c d e"], 1 / 4),
        (wer, "a b", "", 1.0),
        (wer, ["a"], ["a b c"], 2.0),
        (wer, ["one  two "], [" one two"], 0.0),
        (wer, ["", "a b"], ["", "a b"], 0.0),
        (wer, ["", "a b"], ["x", "a b"], 1 / 2),
        (wer, [""], ["x y"], 2.0),
        (wer, [], [], 0.0),
        (cer, ["abc d"], ["abx d"], 1 / 5),
        (cer, ["", "ab"], ["xyz", "ab"], 3 / 2),
    ],
)
def test_error_rates(rate, references, hypotheses, expected):
    assert rate(references, hypotheses) == pytest.approx(expected)


def test_word_errors():
    errors = word_errors(["", "a b c"], ["x", "a c c d"])
    assert (errors.substitutions, errors.deletions, errors.insertions, errors.length) == (1, 0, 2, 3)
    assert alignment("", "x y") == [("insert", "", "x"), ("insert", "", "y")]
    with pytest.raises(ValueError, match="2 references, but 1 hyp"):
        wer(["a", "b"], ["a"])
