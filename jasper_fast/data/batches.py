"""Batches: which utterances form one, and how they are loaded and padded."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from jasper_fast.data import workers as processes
from jasper_fast.data.batch import Batch
from jasper_fast.data.dataset import Item, SpeechDataset
from jasper_fast.data.manifest import Skipped

_TRIES = 3  # a batch is yielded empty after processes have died this many times before it arrived


def _padded(rows: Sequence[np.ndarray | list[int]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    tensors = [torch.as_tensor(row, dtype=dtype) for row in rows]
    return pad_sequence(tensors, batch_first=True) if rows else torch.zeros(0, 0, dtype=dtype), lengths


def collate(items: Sequence[Item]) -> Batch:
    """Makes one zero-padded Batch of a SpeechDataset's items. Items without audio are left out and listed in
    ``skipped``."""
    good = [item for item in items if item.audio is not None]
    return Batch(
        *_padded([item.audio for item in good], torch.float32),
        *_padded([item.target for item in good], torch.int64),
        [item.text for item in good],
        [item.name for item in good],
        [item.index for item in good],
        [s for item in items for s in item.skipped],
        [item.start for item in good],
        warned=[w for item in items for w in item.warned],
    )


class BatchSampler:
    """Decides which items form which batch. All random choices depend only on (seed, epoch), so that a resumed run need
    only skip the steps already done.

    ``durations`` in seconds: a list, or a function of the epoch (``dataset.durations``). At least one limit must be
    given: ``batch_size`` (utterances per batch and rank), or ``max_seconds`` of audio per batch and rank, padding
    included. An utterance longer than ``max_seconds`` is a batch of its own.

    ``bucketing`` puts items of similar length together: it sorts them by length times a random factor from 1 to 1.1.
    Batches are shuffled. With ``shuffle=False`` nothing is random: items keep the given order or, with bucketing, are
    sorted by length. If ``window`` is given, they are then sorted only within groups of ``window`` consecutive items.

    Each utterance is used by one of the ``world_size`` ranks. With shuffling, every rank has the same number of steps.
    To make the numbers equal, large batches are halved; once every batch is a single utterance, some are repeated. If
    there is bucketing too, the batches of a step have similar lengths. Without shuffling, some ranks may have one batch
    more than others.

    ``shards`` is the shard number of each utterance, from 0 on. Shuffled batches are then made from the items of
    ``open_shards`` randomly chosen shards at a time, so that few files are read at a time.

    Raises ValueError if no limit is given, for sizes that are not positive, and for a rank out of range.
    """

    def __init__(
        self,
        durations: Sequence[float] | Callable[[int], Sequence[float]],
        batch_size: int | None = None,
        max_seconds: float | None = None,
        bucketing: bool = True,
        seed: int = 0,
        *,
        shuffle: bool = True,
        window: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        shards: Sequence[int] | None = None,
        open_shards: int = 8,
    ) -> None:
        if batch_size is None and max_seconds is None:
            raise ValueError("give batch_size, max_seconds or both")
        sizes = {"batch_size": batch_size, "max_seconds": max_seconds, "window": window, "open_shards": open_shards}
        if wrong := [f"{name}={size}" for name, size in sizes.items() if size is not None and not size > 0]:
            raise ValueError(f"{', '.join(wrong)} must be positive")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
        self._durations = durations
        self.batch_size, self.max_seconds, self.bucketing, self.seed = batch_size, max_seconds, bucketing, seed
        self.shuffle, self.window, self.rank, self.world_size = shuffle, window, rank, world_size
        self.shards, self.open_shards = None if shards is None else np.asarray(shards), open_shards
        self._kept: dict[int, list[list[int]]] = {}  # the batches of at most two epochs
        self._making = threading.Lock()
        self._left_out: tuple[int, frozenset[int]] = (-1, frozenset())

    def leave_out(self, epoch: int, items: Iterable[int]) -> None:
        """Leaves these items out of the batches of ``epoch``. A resumed run calls this for the items that the epoch has
        already used in batches of other sizes, or with another number of ranks."""
        self._left_out, self._kept = (epoch, frozenset(items)), {}

    def batches(self, epoch: int = 0) -> list[list[int]]:
        """Returns this rank's batches of the epoch, in order, as lists of item indices."""
        if (found := self._kept.get(epoch)) is not None:
            return found
        with self._making:
            if epoch not in self._kept:
                self._kept = dict([*self._kept.items()][-1:]) | {epoch: self._make(epoch)}
            return self._kept[epoch]

    def prepare(self, epoch: int) -> None:
        """Makes the batches of an epoch ahead of time, in a thread. With 280,000 utterances at random speeds this takes
        seconds, for which the training would otherwise wait in ``batches``."""
        threading.Thread(target=self.batches, args=(epoch,), daemon=True).start()

    def steps(self, epoch: int = 0) -> int:
        return len(self.batches(epoch))

    def _make(self, epoch: int) -> list[list[int]]:
        seconds = np.asarray(self._durations(epoch) if callable(self._durations) else self._durations, dtype=float)
        rng = np.random.default_rng((self.seed, epoch))
        left_out = self._left_out[1] if self._left_out[0] == epoch else ()
        jitter = 1 + 0.1 * rng.random(len(seconds)) if self.shuffle else 1.0
        if self.bucketing and self.window is not None and not self.shuffle:
            order = np.lexsort((seconds, np.arange(len(seconds)) // self.window))
        elif self.bucketing:
            order = np.argsort(seconds * jitter, kind="stable")
        else:
            order = rng.permutation(len(seconds)) if self.shuffle else np.arange(len(seconds))
        if not self.shuffle:
            return self._cut([i for i in order.tolist() if i not in left_out], seconds)[self.rank :: self.world_size]
        mine: list[list[int]] = []
        for part in self._parts(order, rng):
            batches = self._cut([i for i in part.tolist() if i not in left_out], seconds)
            self._even_out(batches)
            own = batches[self.rank :: self.world_size]
            mine += [own[step] for step in rng.permutation(len(own))]
        return mine

    def _parts(self, order: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Splits ``order`` into one part for each group of ``open_shards`` shards. Without shards there is one part."""
        if self.shards is None:
            return [order]
        shard = self.shards[order % len(self.shards)]  # joining may make more items than utterances
        turn = rng.permutation(int(self.shards.max()) + 1)[shard] // self.open_shards
        return [order[turn == i] for i in range(int(turn.max()) + 1)]

    def _even_out(self, batches: list[list[int]]) -> None:
        """Halves large batches until their number is a multiple of ``world_size``. Once every batch is a single item,
        the first batches are repeated."""
        while len(batches) % self.world_size:
            at = max(range(len(batches)), key=lambda i: len(batches[i]))
            whole = batches[at]
            if len(whole) == 1:
                batches += batches[: -len(batches) % self.world_size]
            else:
                batches[at : at + 1] = [whole[::2], whole[1::2]]

    def _cut(self, order: list[int], seconds: np.ndarray) -> list[list[int]]:
        batches: list[list[int]] = []
        current: list[int] = []
        longest = 0.0
        for index in order:
            grown = max(longest, seconds[index])
            full = len(current) == self.batch_size or (
                self.max_seconds is not None and grown * (len(current) + 1) > self.max_seconds
            )
            if current and full:
                batches.append(current)
                current, grown = [], seconds[index]
            current.append(index)
            longest = grown
        return [*batches, current] if current else batches


def load_batches(
    dataset: SpeechDataset,
    sampler: BatchSampler,
    epoch: int = 0,
    start_step: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    *,
    endless: bool = False,
) -> Iterator[Batch]:
    """Yields the batches of an epoch from ``start_step`` on, loaded by ``workers`` processes (0: by this process). With
    ``endless`` the same processes continue with all later epochs.

    Skipped utterances are added to ``dataset.skipped``. If a process dies, new ones are started, and the batch is read
    again; after three deaths it is yielded empty. No random numbers are drawn from torch's global generator.
    """
    place = epoch, start_step
    while True:
        ahead: deque[tuple[tuple[int, int], list[int]]] = deque()
        source = processes.begin(dataset, _keys(sampler, *place, endless, ahead), collate, workers, pin_memory)
        with contextlib.suppress(processes.WorkerDied):
            while (batch := next(source, None)) is not None:
                yield _recorded(dataset, batch, ahead.popleft()[0])
            return
        # The next batch is missing. The iterator above has ended, and with it all loading processes. A new process
        # reads only this batch, and then others read all later batches.
        place, items = ahead.popleft()
        yield _recorded(dataset, _alone(dataset, items, place[0], pin_memory), place)
        place = place[0], place[1] + 1


def _keys(
    sampler: BatchSampler, epoch: int, step: int, endless: bool, ahead: deque[tuple[tuple[int, int], list[int]]]
) -> Iterator[list[tuple[int, int]]]:
    """Yields, for each batch from the given epoch and step on, the keys of its items in the dataset. Also appends
    ((epoch, step), items) to ``ahead``, the queue of batches that the loader has begun and not yet delivered."""
    while True:
        batches = sampler.batches(epoch)
        if endless:
            sampler.prepare(epoch + 1)
        for at in range(step, len(batches)):
            ahead.append(((epoch, at), batches[at]))
            yield [(epoch, item) for item in batches[at]]
        if not endless:
            return
        epoch, step = epoch + 1, 0


def _alone(dataset: SpeechDataset, items: list[int], epoch: int, pin_memory: bool) -> Batch:
    """Reads a batch in a new process, because a process died before the batch arrived. Returns an empty batch if the
    new processes die as well."""
    why = None
    for _ in range(_TRIES - 1):
        try:
            return next(processes.begin(dataset, [[(epoch, i) for i in items]], collate, 1, pin_memory))
        except processes.WorkerDied as error:
            why = str(error)  # the error itself would keep the iterator and its processes
    batch = collate([])
    batch.skipped = [
        Skipped(name, "worker_died", f"{name}: its batch could not be read: {why}")
        for name in (dataset.utterances[i % len(dataset.utterances)].name for i in items)
    ]
    return batch


def _recorded(dataset: SpeechDataset, batch: Batch, place: tuple[int, int]) -> Batch:
    batch.epoch, batch.step = place
    dataset.skipped.add(batch.skipped, batch.warned)
    return batch
