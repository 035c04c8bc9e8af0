"""A folder of log-probs. `evaluate --save-log-probs` writes it; afterwards decoding can be tried without the model."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from jasper_fast.speech.text import Vocabulary

_INDEX = "index.json"
_FORMAT = "jasper_fast log-probs 1"


class Saved:
    """Log-probs of utterances, (T', V) fp32 each, in the files 000000.npy and so on of ``folder``. The file index.json
    has the labels and the reference texts."""

    def __init__(self, folder: Path, vocabulary: Vocabulary, frame_seconds: float) -> None:
        self.folder, self.vocabulary, self.frame_seconds = folder, vocabulary, frame_seconds
        self.places: list[int] = []
        self.utterances: list[dict[str, str]] = []

    @staticmethod
    def check(folder: str | os.PathLike) -> Path:
        """Returns the folder's path. Raises ValueError if it exists and is not an empty folder."""
        path = Path(folder)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"--save-log-probs {folder} already exists and is not an empty folder; name another")
        return path

    @classmethod
    def begin(cls, folder: str | os.PathLike, recognizer: Any) -> Self:
        """Creates a folder to fill from a recogniser. Raises ValueError if it exists and is not an empty folder."""
        path = cls.check(folder)
        path.mkdir(parents=True, exist_ok=True)
        return cls(path, recognizer.vocabulary, recognizer.frame_seconds)

    def keep(self, place: int, log_probs: Tensor) -> None:
        np.save(self.folder / f"{place:06}.npy", log_probs.float().cpu().numpy())
        self.places.append(place)

    def finish(self, paths: Sequence[str], references: Sequence[str]) -> None:
        """Writes the index, without which ``open`` refuses the folder."""
        self.utterances = [
            {"file": f"{p:06}.npy", "audio_filepath": paths[p], "text": references[p]} for p in sorted(self.places)
        ]
        index = {"format": _FORMAT, "labels": self.vocabulary.labels, "frame_seconds": self.frame_seconds,
                 "utterances": self.utterances}  # fmt: skip
        (self.folder / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    @classmethod
    def open(cls, folder: str | os.PathLike) -> Self:
        """Opens a filled folder. Raises ValueError, naming the file, if the index is missing, broken or without
        utterances."""
        path = Path(folder) / _INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["format"] != _FORMAT:
                raise ValueError(f"format {index['format']!r}")
            saved = cls(Path(folder), Vocabulary(index["labels"]), float(index["frame_seconds"]))
            saved.utterances = [{k: str(u[k]) for k in ("file", "audio_filepath", "text")} for u in index["utterances"]]
            if not saved.utterances:
                raise ValueError("no utterances")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not an index of log-probs ({type(error).__name__}: {error}); "
                "`jasper-fast evaluate --save-log-probs` makes one"
            ) from None
        return saved

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the log-probs of each utterance, (1, T', V) fp32, and their length, (1,)."""
        for number in range(len(self.utterances)):
            found = torch.from_numpy(self.log_probs(number))[None]
            yield found, torch.tensor([found.shape[1]])

    def log_probs(self, number: int) -> np.ndarray:
        """Returns the log-probs of utterance ``number``, (T', V) fp32."""
        path = self.folder / Path(self.utterances[number]["file"]).name
        try:
            found = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: cannot be read as log-probs ({error})") from None
        if found.ndim != 2 or found.shape[1] != self.vocabulary.n_classes or found.dtype != np.float32:
            raise ValueError(f"{path}: expected float32 (T, {self.vocabulary.n_classes}), got {found.dtype} "
                             f"{found.shape}")  # fmt: skip
        return found
