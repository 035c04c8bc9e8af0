"""ARPA files for tests."""

from __future__ import annotations

import random
from pathlib import Path


def random_arpa(path: Path, words: list[str], order: int, rng: random.Random, unknown: bool = True) -> Path:
    """An ARPA file with all n-grams of a few random lines; its numbers are drawn at random (no distribution)."""
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
