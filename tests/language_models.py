"""Language models, log-probs and checks that several tests use."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch

from jasper_fast.kernels import native
from jasper_fast.lm.neural.config import LMConfig
from jasper_fast.lm.neural.model import TransformerXL
from jasper_fast.speech.text import Vocabulary

needs_native = pytest.mark.skipif(not native.cpu_available(), reason="the native CPU library is not built")
needs_kenlm = pytest.mark.skipif(importlib.util.find_spec("kenlm") is None, reason="ufal-kenlm is not installed")


def random_arpa(path: Path, words: list[str], order: int, rng: random.Random, unknown: bool = True) -> Path:
    """Writes an ARPA file with all n-grams of a few random lines. Its log-probabilities are random numbers."""
    layers: list[set[tuple[str, ...]]] = [set() for _ in range(order)]
    layers[0] |= {(w,) for w in ("<s>", "</s>", *words, *(["<unk>"] if unknown else []))}
    for _ in range(5):
        line = ["<s>", *(rng.choice(words) for _ in range(rng.randint(1, 8))), "</s>"]
        for n in range(2, order + 1):
            layers[n - 1] |= {tuple(line[i : i + n]) for i in range(len(line) - n + 1)}
    lines = ["\\data\\", *(f"ngram {n}={len(layer)}" for n, layer in enumerate(layers, 1)), ""]
    for n, layer in enumerate(layers, 1):
        lines.append(f"\\{n}-grams:")
        for gram in sorted(layer):
            back_off = f"\t{-rng.random():.6f}" if n < order and gram[-1] != "</s>" else ""
            log10 = "-99" if gram == ("<s>",) else f"{-3 * rng.random():.6f}"
            lines.append(f"{log10}\t{' '.join(gram)}{back_off}")
        lines.append("")
    path.write_text("\n".join([*lines, "\\end\\", ""]))
    return path


def assert_refused(run, capsys, command: str, cases) -> None:
    """Checks that each command line in `cases`, (arguments, message), fails with this message, in one line."""
    for argv, message in cases:
        assert run(*argv) == 2, argv
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert error.startswith(f"jasper-fast {command}: error: "), error


def printed(run, capsys, *argv) -> str:
    """Runs a command, which must succeed, and returns what it prints."""
    capsys.readouterr()
    assert run(*argv) == 0
    return capsys.readouterr().out


def hear(
    vocabulary: Vocabulary, text: str, sharp: float = 4.0, seed: int = 0, times: int = 1, noise: float = 1.0
) -> torch.Tensor:
    """Returns noisy log-probs (T, V). Without the noise, each symbol of `text` fills `times` frames of the best
    path, and a blank follows it."""
    ids = [i for c in vocabulary.encode(text) for i in ([c] * times + [vocabulary.blank])]
    log_probs = noise * torch.randn(len(ids), vocabulary.n_classes, generator=torch.Generator().manual_seed(seed))
    log_probs[torch.arange(len(ids)), torch.tensor(ids)] += sharp
    return log_probs.log_softmax(-1)


def random_neural(path: Path, words: list[str], **settings) -> Path:
    """Writes a checkpoint of a small neural model. Its random weights are large, so that texts get different scores."""
    torch.manual_seed(0)
    config = LMConfig(len(words) + 2, **{"layers": 1, "width": 8, "heads": 2, "inner": 8, "memory": 16} | settings)
    weights = {name: x + 0.5 * torch.randn_like(x) for name, x in TransformerXL(config).state_dict().items()}
    torch.save({"language_model": vars(config), "names": ["</s>", "<unk>", *words], "state_dict": weights}, path)
    return path
