"""Each HTML page is one file that loads nothing else, is well formed and shows hostile texts as plain text."""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import corpora
import numpy as np
import pytest
import test_bench_report
import test_demo

from jasper_fast.bench.report import html_page
from jasper_fast.data.manifest import Utterance
from jasper_fast.data.prepare import check
from jasper_fast.demo import report
from jasper_fast.inference import evaluation
from jasper_fast.lm import heat_map
from jasper_fast.lm.tune import Trial
from jasper_fast.speech.metrics import Errors

HOSTILE = "<script>alert(1)</script>\"' onload='x' &amp; <img src=http://evil/x> \u2028 ]]> --> {{ 7*7 }}"
VOID = {"meta", "br", "img", "input", "hr", "link", "wbr"}
# Elements whose end tag is optional in HTML.
IMPLIED = {"td", "th", "tr", "p", "li", "dt", "dd", "html", "head", "body"}
ADDRESSES = {"src", "href", "poster", "data", "action", "srcset", "xlink:href"}


class Page(HTMLParser):
    """A parsed page. Raises AssertionError if the page is not whole (no title, or tags not closed in order), if it has
    a script or an event handler, or if it loads something from elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.text = [], [], [], []
        self.counts = Counter()
        self.feed(html)
        self.close()
        assert html.lstrip().lower().startswith("<!doctype html>")
        assert not set(self.open) - IMPLIED, self.open
        assert len(set(self.ids)) == len(self.ids) and set(self.links) <= set(self.ids)
        assert self.counts.keys() >= {"title", "style", "h1"}
        assert 'charset="utf-8"' in html and 'name="viewport"' in html and 'lang="en"' in html

    def handle_starttag(self, tag: str, attrs: list) -> None:
        named = dict(attrs)
        assert len(named) == len(attrs) and not [name for name in named if name.startswith("on")], attrs
        assert tag not in ("script", "link", "iframe", "object", "embed", "base"), tag
        for name in ADDRESSES & named.keys():
            assert re.match(r"data:(audio|image)/|#", named[name]), (tag, name, named[name][:80])
            self.links += [named[name][1:]] if named[name].startswith("#") else []
        assert "url(" not in named.get("style", "")
        if tag == "img" or named.get("role") == "img":
            assert named.get("alt") is not None or named.get("aria-label"), attrs
        self.ids += [named["id"]] if "id" in named else []
        self.counts[tag] += 1
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] != tag and self.open[-1] in IMPLIED:
            self.open.pop()
        assert self.open and self.open.pop() == tag, f"</{tag}> in {self.open}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data
        self.text.append(data)


def of_evaluation(folder: Path) -> str:
    (folder / "a.flac").write_bytes(corpora.tone(1, 0.5))
    row = {
        "audio_filepath": str(folder / "a.flac"), "offset": 0, "duration": 0.5, "manifest": HOSTILE, "speaker": HOSTILE,
        "text": f"words {HOSTILE}", "pred_text": HOSTILE, "confidence": 0.5, "word_errors": 2, "words": 4,
        "character_errors": 4, "characters": 9,
    }  # fmt: skip
    rows = [row, row | {"audio_filepath": f"{folder}/{HOSTILE}.wav", "pred_text": ""}]
    figures = evaluation.totals(rows) | evaluation.by_parts(rows) | {
        **dict.fromkeys(("substitutions", "deletions", "insertions", "threads", "processes"), 1),
        **dict.fromkeys(("checkpoint", "device", "backend"), HOSTILE),
        **dict.fromkeys(("audio_seconds", "wall_seconds", "rtfx", "utterances_per_s"), 1.0),
        "skipped": [], "warned": [], "manifests": [HOSTILE], "ema": True,
    }  # fmt: skip
    return evaluation.html(figures, rows, 5)


def of_check(folder: Path) -> str:
    found = [
        check.Found({}, Utterance(HOSTILE, 1.0, HOSTILE), [check.Fault(reason, HOSTILE)], 1.0, -3.0, -20.0, 10)
        for reason in check.REASONS
    ]
    return check.html(HOSTILE, found, check.Rules())


def of_tuning(folder: Path) -> str:
    trials = [Trial(a, b, Errors(1, 0, int(4 * a), 10)) for a in (0.5, 1.0) for b in (-1.0, 0.0)]
    return heat_map.page(trials, Errors(5, 0, 0, 10), HOSTILE)


def of_bench(_: Path) -> str:
    return html_page.page([test_bench_report.full(HOSTILE), test_bench_report.full(f"another {HOSTILE}")])


def of_demo(folder: Path) -> str:
    result = test_demo.RESULT | {"examples": [e | {"transcript": HOSTILE} for e in test_demo.RESULT["examples"]]}
    return report.render(result, np.random.default_rng(0).random((2, 64, 100)), [b"RIFF"] * 2)


@pytest.mark.parametrize("made", [of_evaluation, of_check, of_tuning, of_bench, of_demo])
def test_a_page_is_whole_and_shows_hostile_texts(tmp_path: Path, made) -> None:
    html = made(tmp_path)
    page = Page(html)
    shown = " ".join("".join(page.text).split())
    assert "<script>alert(1)</script>\"' onload='x' &amp; <img src=http://evil/x>" in shown and "{{ 7*7 }}" in shown
    assert len(html) < 400_000
    if made is of_evaluation:
        assert page.counts["audio"] == 1, "only one of the two files exists"


@pytest.mark.parametrize(
    "wrong",
    ["<p><b></p>", "<img src='http://x'>", "<script></script>", "<a href='#none'>x</a>", "<b onclick='x'></b>", "</i>"],
)
def test_a_faulty_page_is_told(wrong: str) -> None:
    page = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport"><title></title><style></style>'
    Page(f"{page}<h1>x</h1></html>")
    with pytest.raises(AssertionError):
        Page(f"{page}<h1>x</h1>{wrong}</html>")
