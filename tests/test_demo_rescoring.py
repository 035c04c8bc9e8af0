"""The comparison of a first pass with a rescoring pass: the printed lines, and the model that it trains."""

import random
import re

import pytest
import torch

from jasper_fast.demo import rescoring
from jasper_fast.kernels import native
from jasper_fast.lm.neural import scoring
from jasper_fast.lm.saved import Saved
from jasper_fast.speech.text import Vocabulary


@pytest.mark.skipif(not native.cpu_available(), reason="the native CPU library is not built")
def test_the_lines_of_a_comparison(tmp_path):
    torch.manual_seed(0)
    rng, v = random.Random(0), Vocabulary()
    texts = [" ".join(rng.choices(("one", "two", "three", "four"), k=3)) for _ in range(12)]
    saved = Saved(tmp_path, v, 0.02)
    for i, text in enumerate(texts):
        ids = [x for c in v.encode(text) for x in (c, v.blank)]
        log_probs = 0.5 * torch.randn(len(ids), v.n_classes)
        log_probs[torch.arange(len(ids)), torch.tensor(ids)] += 5.0
        log_probs[0, 4] += 5.5  # suggests a "d", although no text begins with one
        saved.keep(i, log_probs.log_softmax(-1))
    saved.finish([f"{i}.wav" for i in range(12)], texts)
    scorer = lambda found: [0.0 if text in texts else -2000.0 for text in found]  # noqa: E731
    lines = rescoring.compare(Saved.open(tmp_path), scorer, [("no language model", None)], 64)
    first, second = (float(x) for x in re.findall(r"([\d.]+) % \(", lines[0]))
    assert len(lines) == 1 and second == 0.0 < first and "100.0 % [100.0, 100.0] fewer errors" in lines[0]


def test_a_model_of_the_texts(tmp_path):
    (tmp_path / "texts.txt").write_text("a b c\n" * 400)
    rescoring.learn(tmp_path / "texts.txt", tmp_path / "neural", 4)
    lm = scoring.load(tmp_path / "neural", "cpu")
    assert lm.tokens.names[2:] == ["a", "b", "c"] and (tmp_path / "neural" / "dev.txt").read_text() == "a b c\n" * 40
