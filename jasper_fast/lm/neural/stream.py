"""The text that a neural language model learns from: a stream of tokens in a file, of which each step reads a part."""

import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from jasper_fast.lm.neural.config import LMConfig
from jasper_fast.lm.neural.model import BOUNDARY, Memory
from jasper_fast.lm.neural.tokens import Progress, Tokens
from jasper_fast.lm.texts import TextFile, chunks


class Stream:
    """Tokens (int32, on disk) with a boundary before each line, cut into ``rows`` parts that are read side by side.

    A step reads ``length`` tokens of each part. The cuts are drawn anew for each epoch, so that epochs differ.
    """

    def __init__(self, tokens: np.ndarray, rows: int, length: int, seed: int, fingerprint: str = "") -> None:
        self.tokens, self.rows, self.length, self.seed, self.fingerprint = tokens, rows, length, seed, fingerprint

    @property
    def steps(self) -> int:
        """Steps per epoch; 0 if there are too few tokens."""
        return len(self.tokens) // (self.rows * self.length)

    def _starts(self, epoch: int, position: int) -> np.ndarray:
        """Returns the place in the stream where each row of a step begins."""
        offset = np.random.default_rng((self.seed, epoch)).integers(len(self.tokens))
        return (offset + (np.arange(self.rows) * self.steps + position) * self.length) % len(self.tokens)

    def segment(self, epoch: int, position: int) -> Tensor:
        """Returns the tokens of a step, (rows, length + 1) int64. The last token of each row is only a target."""
        places = (self._starts(epoch, position)[:, None] + np.arange(self.length + 1)) % len(self.tokens)
        return torch.from_numpy(self.tokens[places].astype(np.int64))

    def names(self, epoch: int, position: int) -> list[str]:
        """Returns a description of each row of a step, for messages."""
        return [f"tokens {i} to {i + self.length}" for i in self._starts(epoch, position).tolist()]


def write(texts: Iterable[TextFile], tokens: Tokens, folder: Path, progress: Progress) -> tuple[np.ndarray, str]:
    """Writes the tokens of texts to a temporary file in ``folder``. Returns the tokens, mapped into memory, and their
    fingerprint.

    Raises LanguageModelError for a text that cannot be read, and OSError if the disk is full.
    """
    checksum = count = 0
    with tempfile.TemporaryFile(dir=folder) as file:  # deleted when no process has it open any more
        for _, chunk in chunks(texts, lambda pieces: [BOUNDARY, *tokens.encode(pieces)], progress):
            checksum = zlib.crc32(chunk, checksum)
            count += len(chunk)
            file.write(chunk)
        file.flush()
        written = np.memmap(file, np.int32, "r") if count else np.zeros(0, np.int32)
        return written, f"{count} tokens, crc32 {checksum:08x}"


class Held(nn.Module):
    """The Transformer-XL memory of each row between training steps, in buffers, so that checkpoints include it."""

    def __init__(self, config: LMConfig, rows: int) -> None:
        super().__init__()
        self.register_buffer("hidden", torch.zeros(config.layers, rows, config.memory, config.width))
        self.register_buffer("lines", torch.full((rows, config.memory), -1))

    @property
    def memory(self) -> Memory:
        return Memory(self.hidden, self.lines)

    @torch.no_grad()
    def take(self, memory: Memory) -> None:
        self.hidden.copy_(memory.hidden), self.lines.copy_(memory.lines)

    @torch.no_grad()
    def forget(self) -> None:
        self.hidden.zero_(), self.lines.fill_(-1)
