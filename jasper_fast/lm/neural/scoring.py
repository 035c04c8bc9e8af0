"""Scores texts with a neural language model, in batches."""

import itertools
import math
import os
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from jasper_fast.lm.arpa import LanguageModelError
from jasper_fast.lm.neural.config import LMConfig
from jasper_fast.lm.neural.files import checkpoint_of
from jasper_fast.lm.neural.model import BOUNDARY, UNKNOWN, Memory, TransformerXL
from jasper_fast.lm.neural.tokens import Tokens
from jasper_fast.lm.perplexity import Perplexity
from jasper_fast.lm.texts import TextFile
from jasper_fast.nn import checkpoint

_TOKENS = 1 << 14  # tokens that the model reads at a time, unless one row has more
_LOGITS = 1 << 26  # logits that are held in memory at a time


class NeuralLM:
    """A scorer: ``lm(texts)`` returns log p of each text, including its end, in natural logarithms.

    Each text is scored independently of the others. Words outside the vocabulary count as the unknown word. A text
    longer than the model's memory (or than 32 tokens, if that is more) is read in segments. A token then sees only the
    tokens in the memory and those before it in its own segment.
    """

    def __init__(self, model: TransformerXL, tokens: Tokens) -> None:
        self.model, self.tokens = model, tokens
        self.segment = max(model.config.memory, 32)

    def __call__(self, texts: Sequence[str]) -> list[float]:
        rows = [array("i", [BOUNDARY, *self.tokens.encode(self.tokens.pieces(t)), BOUNDARY]) for t in texts]
        return [float(row.double().sum()) for row in self.log_probs(rows)]

    @torch.inference_mode()
    def log_probs(self, rows: Sequence[Sequence[int]], stopped: Callable[[], bool] = lambda: False) -> list[Tensor]:
        """Returns log p of every token but the first of each row, on the CPU. A row must have at least two tokens. If
        ``stopped()`` becomes true, the scoring ends and the list is empty."""
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
        """Returns log p for a batch of rows, the longest first. A row leaves the batch when it ends."""
        device, memory = self.model.embedding.weight.device, None
        parts: list[list[Tensor]] = [[] for _ in rows]
        for first in range(0, len(rows[0]) - 1, self.segment):
            active = [row[first : first + self.segment + 1] for row in rows if len(row) - 1 > first]
            padded = pad_sequence([torch.tensor(row, dtype=torch.int64) for row in active], True, BOUNDARY).to(device)
            if memory is not None:
                memory = Memory(memory.hidden[:, : len(active)], memory.lines[: len(active)])
            hidden, memory = self.model(padded[:, :-1], memory)
            scores = self._softmax(hidden, padded[:, 1:]).cpu()
            for i, row in enumerate(active):
                parts[i].append(scores[i, : len(row) - 1])
            if stopped():
                break
        return [torch.cat(part) for part in parts]

    def _softmax(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Returns log p of the targets, computed in pieces that fit into memory."""
        size = max(1, _LOGITS // self.model.config.vocabulary)
        pairs = zip(hidden.flatten(0, 1).split(size), targets.flatten().split(size), strict=True)
        return torch.cat([self.model.log_probs(h[None], t[None])[0] for h, t in pairs]).view_as(targets)

    def rows(self, text: TextFile) -> list[array]:
        """Returns the token rows of a text: one per line, or a single row if the model joins lines. Raises
        LanguageModelError if the text has no words."""
        made = [array("i", [BOUNDARY, *self.tokens.encode(pieces), BOUNDARY]) for pieces in text]
        if not made:
            raise LanguageModelError(f"{text.path}: has no words")
        if not self.model.config.joined:
            return made
        return [array("i", itertools.chain([BOUNDARY], *(row[1:] for row in made)))]

    def perplexity(self, text: str | os.PathLike, lower_case: bool = False) -> Perplexity:
        """Measures how well the model predicts a text with one sentence per line. Raises LanguageModelError if the text
        cannot be read or has no words."""
        rows = self.rows(TextFile(text, self.tokens.characters, self.tokens.lower_case or lower_case))
        return figures(rows, self.log_probs(rows))


def figures(rows: Sequence[Sequence[int]], log_probs: Sequence[Tensor]) -> Perplexity:
    """Returns the perplexity of token rows from the log-probabilities of all tokens but the first of each row."""
    ids = torch.cat([torch.tensor(row[1:]) for row in rows])
    scores = torch.cat(list(log_probs)).double() / math.log(10)
    ends, unknown = int((ids == BOUNDARY).sum()), ids == UNKNOWN
    return Perplexity(
        ends, len(ids) - ends, int(unknown.sum()), float(scores.sum()), float(scores[unknown].sum())
    )  # fmt: skip


def read(path: str | os.PathLike) -> tuple[TransformerXL, Tokens, dict[str, Any]]:
    """Returns the model of a checkpoint or of a folder of checkpoints, its tokens, and the whole checkpoint as a dict.
    Averaged weights are used if there are any. Nothing in the file is executed. Raises LanguageModelError or
    CheckpointError naming the file."""
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
            raise ValueError(f"{len(tokens)} words instead of {config.vocabulary}")
        weights = state.get("ema_state_dict") or state["state_dict"]
        for name, tensor in weights.items():
            if not tensor.is_floating_point() or not tensor.is_contiguous() or not torch.isfinite(tensor).all():
                raise ValueError(f"{name} is not a dense floating-point tensor of finite numbers")
        with torch.device("meta"):  # nothing is allocated before the shapes are known to fit
            model = TransformerXL(config)
        model.load_state_dict(weights, assign=True)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        what = " ".join(str(error).split())[:200]
        raise LanguageModelError(f"{file}: its language model is broken ({what}); take an earlier checkpoint") from None
    return model.float().requires_grad_(False).eval(), tokens, state


def load(path: str | os.PathLike, device: torch.device | str = "auto") -> NeuralLM:
    """Loads the scorer from a checkpoint of `jasper-fast lm train-neural`, or from its folder.

    ``device``: "auto" is a GPU if there is one. Raises LanguageModelError or CheckpointError naming the file.
    """
    model, tokens, _ = read(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return NeuralLM(model.to(device), tokens)


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """Describes a neural model: form, size, vocabulary, shape, and how far it is trained."""
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
