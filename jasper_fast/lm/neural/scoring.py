"""Texts scored by a neural language model, in batches."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from jasper_fast.lm.arpa import LanguageModelError
from jasper_fast.lm.neural.config import LMConfig
from jasper_fast.lm.neural.files import checkpoint_of
from jasper_fast.lm.neural.model import BOUNDARY, UNKNOWN, TransformerXL
from jasper_fast.lm.neural.tokens import Tokens
from jasper_fast.lm.perplexity import Perplexity
from jasper_fast.nn import checkpoint

_TOKENS = 1 << 14  # of a batch
_LOGITS = 1 << 26  # logits that are computed at a time


class NeuralLM:
    """A scorer: ``lm(texts)`` gives log p of each text, its end included, in natural logarithms.

    Texts stand alone. Words outside the vocabulary count as the unknown one. A text longer than the model's memory is
    read in segments, and each token sees at least so many before it.
    """

    def __init__(self, model: TransformerXL, tokens: Tokens) -> None:
        self.model, self.tokens = model, tokens
        self.segment = max(model.config.memory, 32)

    def __call__(self, texts: Sequence[str]) -> list[float]:
        rows = [array("i", [BOUNDARY, *self.tokens.encode(self.tokens.pieces(t)), BOUNDARY]) for t in texts]
        found = self.log_probs(rows)
        return [float(row.double().sum()) for row in found]

    @torch.inference_mode()
    def log_probs(self, rows: Sequence[Sequence[int]], stopped: Callable[[], bool] = lambda: False) -> list[Tensor]:
        """log p of every token but the first of each row, on the CPU; a row has at least two tokens. Returns an empty
        list once ``stopped()`` is true."""
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: list[Any] = [None] * len(rows)
        mode, first = self.model.training, 0
        self.model.eval()
        try:
            while first < len(order):
                if stopped():
                    return []
                count = max(1, _TOKENS // min(len(rows[order[first]]), self.segment))
                batch = order[first : first + count]
                for i, row in zip(batch, self._batch([rows[i] for i in batch], stopped), strict=True):
                    found[i] = row
                first += count
        finally:
            self.model.train(mode)
        return [] if stopped() else found

    def _batch(self, rows: Sequence[Sequence[int]], stopped: Callable[[], bool]) -> list[Tensor]:
        """log p for a batch of rows, the longest first. A row that has ended leaves the batch."""
        device, memory = self.model.embedding.weight.device, None
        parts: list[list[Tensor]] = [[] for _ in rows]
        for first in range(0, len(rows[0]) - 1, self.segment):
            active = [row[first : first + self.segment + 1] for row in rows if len(row) - 1 > first]
            padded = torch.full((len(active), len(active[0])), BOUNDARY)
            for i, row in enumerate(active):
                padded[i, : len(row)] = torch.tensor(row)
            padded = padded.to(device)
            if memory is not None:
                memory = type(memory)(memory.hidden[:, : len(active)], memory.lines[: len(active)])
            hidden, memory = self.model(padded[:, :-1], memory)
            scores = self._softmax(hidden, padded[:, 1:]).cpu()
            for i, row in enumerate(active):
                parts[i].append(scores[i, : len(row) - 1])
            if stopped():
                break
        return [torch.cat(part) for part in parts]

    def _softmax(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log p of the targets, in pieces that fit the memory."""
        size = max(1, _LOGITS // self.model.config.vocabulary)
        pairs = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
        return torch.cat([self.model.log_probs(h[None], t[None])[0] for h, t in pairs]).view_as(targets)

    def rows(self, lines: Iterator[Sequence[str]]) -> list[array]:
        """The token rows of a text: one for each line, or a single one if the model joins lines."""
        made = [array("i", [BOUNDARY, *self.tokens.encode(pieces), BOUNDARY]) for pieces in lines]
        if not self.model.config.joined or not made:
            return made
        whole = array("i", [BOUNDARY])
        for row in made:
            whole.extend(row[1:])
        return [whole]

    def perplexity(self, text: str | os.PathLike, lower_case: bool = False) -> Perplexity:
        """How well the model foresees a text, a sentence a line. Raises LanguageModelError where it cannot be read or
        has no words."""
        file = self.tokens.file(text)
        file.lower_case |= lower_case
        rows = self.rows(iter(file))
        if not rows:
            raise LanguageModelError(f"{text}: no words in it")
        return figures(rows, self.log_probs(rows))


def figures(rows: Sequence[Sequence[int]], log_probs: Sequence[Tensor]) -> Perplexity:
    """The perplexity of rows of tokens, by the log-probabilities of all but the first of each."""
    ids, scores = torch.cat([torch.tensor(row[1:]) for row in rows]), torch.cat(list(log_probs)).double()
    scores = scores / math.log(10)
    ends, unknown = int((ids == BOUNDARY).sum()), ids == UNKNOWN
    return Perplexity(
        ends, len(ids) - ends, int(unknown.sum()), float(scores.sum()), float(scores[unknown].sum())
    )  # fmt: skip


def read(path: str | os.PathLike) -> tuple[TransformerXL, Tokens, dict[str, Any]]:
    """The model in a checkpoint or a folder of them, with the averaged weights where there are any, and what else the
    checkpoint holds. Nothing in it is executed. Raises LanguageModelError or CheckpointError naming the file."""
    file = checkpoint_of(path)
    if not file.is_file():
        raise LanguageModelError(f"{path}: no such language model")
    state = checkpoint.load(file)
    if "language_model" not in state:
        raise LanguageModelError(f"{file}: holds no neural language model; `jasper-fast lm train-neural` makes one")
    try:
        config = LMConfig.of(state["language_model"])
        tokens = Tokens(state["names"], config.characters, config.lower_case)
        if len(tokens) != config.vocabulary:
            raise ValueError(f"{len(tokens)} words where {config.vocabulary} belong")
        weights = state.get("ema_state_dict") or state["state_dict"]
        for name, tensor in weights.items():
            if not tensor.is_floating_point() or not tensor.is_contiguous() or not torch.isfinite(tensor).all():
                raise ValueError(f"{name} is no tensor of finite numbers")
        with torch.device("meta"):  # nothing is allocated before the shapes are known to fit
            model = TransformerXL(config)
        model.load_state_dict(weights, assign=True)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        what = " ".join(str(error).split())[:200]
        raise LanguageModelError(f"{file}: the language model in it is broken ({what}); take an earlier one") from None
    return model.float().requires_grad_(False).eval(), tokens, state


def load(path: str | os.PathLike, device: torch.device | str = "auto") -> NeuralLM:
    """The scorer in a checkpoint of `jasper-fast lm train-neural`, or in its folder.

    ``device``: "auto" is a GPU where there is one. Raises LanguageModelError or CheckpointError naming the file.
    """
    model, tokens, _ = read(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return NeuralLM(model.to(device), tokens)


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """What a neural model is: form, size, vocabulary, shape, and the training so far."""
    file = checkpoint_of(path)
    model, tokens, state = read(file)
    config = model.config
    best = state.get("best_perplexity", math.inf)
    return {
        "file": str(file),
        "form": "neural (Transformer-XL)",
        "bytes": file.stat().st_size,
        "of": "characters" if tokens.characters else "words",
        "vocabulary": len(tokens) - 2,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.layers,
        "width": config.width,
        "heads": config.heads,
        "inner": config.inner,
        "memory": config.memory,
        "cutoffs": list(config.cutoffs),
        "lower_case": config.lower_case,
        "joined": config.joined,
        "step": state.get("step"),
        "best_perplexity": best if math.isfinite(best) else None,
    }
