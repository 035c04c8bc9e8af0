"""Aligns a given text with the frames: finds the best CTC path that collapses to it."""

from collections.abc import Sequence

import numpy as np


def best_path(log_probs: np.ndarray, symbols: Sequence[int]) -> np.ndarray | None:
    """Returns the class of each frame on the best path of ``symbols``, or None if no path is possible, for example
    because there are too few frames. log_probs: (T, V), with the blank last."""
    frames, classes = log_probs.shape
    extended = np.full(2 * len(symbols) + 1, classes - 1)
    extended[1::2] = symbols
    if not frames:
        return None if len(symbols) else np.zeros(0, dtype=np.int64)
    # A path may skip the blank between two symbols only if they differ.
    may_skip = np.zeros(len(extended), dtype=bool)
    may_skip[3::2] = extended[3::2] != extended[1:-2:2]
    emitted = log_probs.astype(np.float64)[:, extended]
    score = np.full(len(extended), -np.inf)
    score[:2] = emitted[0, :2]
    steps = np.zeros((frames, len(extended)), dtype=np.int8)
    shifted = np.full((3, len(extended)), -np.inf)
    for t in range(1, frames):
        shifted[0] = score
        shifted[1, 1:] = score[:-1]
        shifted[2, 2:] = np.where(may_skip[2:], score[:-2], -np.inf)
        steps[t] = shifted.argmax(0)
        score = shifted.max(0) + emitted[t]
    place = len(extended) - 1 - int(len(extended) > 1 and score[-2] > score[-1])
    if score[place] == -np.inf:
        return None
    path = np.empty(frames, dtype=np.int64)
    for t in range(frames - 1, -1, -1):
        path[t] = extended[place]
        place -= int(steps[t, place])
    return path
