"""The configuration of a neural language model, as its checkpoint stores it."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, Self

from jasper_fast.nn.config import refuse

_SPLITS = (2000, 20000)  # cutoffs of the adaptive softmax for large vocabularies


@dataclass(frozen=True)
class LMConfig:
    """The size of a model (``inner``: width of the feed-forward parts), and how it reads texts.

    ``memory``: how many earlier tokens a segment remembers. ``cutoffs``: frequency ranks at which the adaptive softmax
    is split; none for a plain softmax. ``joined``: whether a line may attend to the lines before it. Raises ValueError
    naming an invalid setting.
    """

    vocabulary: int
    characters: bool = False
    lower_case: bool = False
    joined: bool = False
    layers: int = 4
    width: int = 256
    heads: int = 4
    inner: int = 1024
    dropout: float = 0.1
    memory: int = 128
    cutoffs: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        most = {"layers": 64, "width": 1 << 16, "heads": 1 << 10, "inner": 1 << 18}
        sizes = {name: getattr(self, name) for name in most}
        rising = all(a < b for a, b in itertools.pairwise((1, *self.cutoffs, self.vocabulary)))
        refuse(
            ValueError,
            *((not 1 <= n <= most[name], f"{name} {n} is not from 1 to {most[name]}") for name, n in sizes.items()),
            (not 3 <= self.vocabulary <= 1 << 24 or not 0 <= self.memory <= 1 << 16,
             f"vocabulary {self.vocabulary} or memory {self.memory} is too small or too large"),
            (not 0 <= self.dropout < 1, f"dropout {self.dropout} is not in [0, 1)"),
            (not self.heads or self.width % (2 * self.heads),
             f"width {self.width} must be an even multiple of the number of heads, {self.heads}"),
            (not rising, f"cutoffs {self.cutoffs} must rise from at least 2 to below {self.vocabulary}"),
        )  # fmt: skip

    @classmethod
    def of(cls, saved: Any) -> Self:
        """Makes a config from the dict that ``vars(config)`` returned. Raises ValueError for anything else."""
        known = {field.name: type(field.default) for field in dataclasses.fields(cls)} | {"vocabulary": int}
        if not isinstance(saved, dict) or set(saved) != set(known):
            raise ValueError("its settings are not those of a language model")
        for name, kind in known.items():
            if type(saved[name]) is not kind or (kind is tuple and any(type(c) is not int for c in saved[name])):
                raise ValueError(f"{name} is {saved[name]!r:.40}")
        return cls(**saved)


def cutoffs(words: int) -> tuple[int, ...]:
    """Returns the cutoffs of the adaptive softmax for this number of words; none if there are few."""
    return tuple(c for c in _SPLITS if 2 * c <= words)
