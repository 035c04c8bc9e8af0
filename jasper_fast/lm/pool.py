"""Searches with a word model in separate processes, because flashlight holds the GIL and a broken model can crash the
process that reads it. Nothing here imports torch, so these processes start fast and need little memory."""

import functools
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from typing import Any

import numpy as np

from jasper_fast.lm.align import best_path
from jasper_fast.lm.arpa import LanguageModelError
from jasper_fast.lm.words import WordLM, WordSearch
from jasper_fast.speech.text import Hypothesis

# the texts found, and the best CTC path of the first of them (None if none was found)
Answer = tuple[list[Hypothesis], np.ndarray | None]

_settings: tuple[WordLM, dict[str, Any]]


class Pool:
    """A pool of ``processes`` that search with a word model. Raises LanguageModelError if loading the model fails or
    crashes a process, and MissingExtra if the packages of the extra `lm` are missing."""

    def __init__(self, lm: WordLM, processes: int, **settings: Any) -> None:
        self._path = lm.path
        self._executor = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (lm, settings))
        try:
            self._result(self._executor.submit(_check))
        except BaseException:
            self.close()
            raise

    def submit(self, log_probs: Sequence[np.ndarray], weights: tuple[float, float]) -> Callable[[], list[Answer]]:
        """Starts a search in each (T, V) array, with ``weights`` (alpha, beta). Returns a function that waits for the
        results and returns them."""
        futures = [self._executor.submit(_decode, item, weights) for item in log_probs]
        return lambda: [self._result(future) for future in futures]

    def _result(self, future: Future) -> Any:
        try:
            return future.result()
        except BrokenExecutor:
            raise LanguageModelError(
                f"{self._path}: the process that searches with this model was ended by the system: the file may be "
                "broken, or too large for the memory, or your script lacks `if __name__ == '__main__':`"
            ) from None

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)


def _start(lm: WordLM, settings: dict[str, Any]) -> None:
    global _settings
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    _settings = lm, settings


@functools.cache
def _search() -> WordSearch:
    lm, settings = _settings
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hides KenLM's progress and crash messages
    return WordSearch(lm, **settings)


def _check() -> None:
    _search()  # the search is not returned, because it cannot be pickled


def _decode(log_probs: np.ndarray, weights: tuple[float, float]) -> Answer:
    search = _search()
    if weights != (search.alpha, search.beta):
        search.weigh(*weights)
    found = search(log_probs)
    return found, best_path(log_probs, found[0].symbols) if found else None
