"""Transcribes audio: puts checkpoint, features, engine and decoding together."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from jasper_fast.data import batches, manifest
from jasper_fast.data.batch import Batch
from jasper_fast.data.dataset import SpeechDataset
from jasper_fast.data.settings import AudioSettings
from jasper_fast.inference import InferenceEngine
from jasper_fast.nn.checkpoint import no_memory
from jasper_fast.nn.config import JasperConfig
from jasper_fast.nn.loading import load_model
from jasper_fast.nn.model import Jasper
from jasper_fast.speech.decoding import NotFinite, Transcript, greedy_transcripts
from jasper_fast.speech.features import LogMelFeatures
from jasper_fast.speech.text import LABELS, Vocabulary


@dataclass
class Recognition:
    """The results for a list of utterances: ``transcripts`` in the order of the list (None if skipped), and times.

    ``audio_seconds`` is the length of the transcribed audio; ``compute_seconds`` is the time from samples to text;
    ``wall_seconds`` also includes reading files. While ``Recognizer.stream`` runs, ``finished`` is the number of
    utterances that have their final result, and all of the first ``done`` utterances of the list have theirs.
    """

    transcripts: list[Transcript | None]
    references: list[str]
    seconds: list[float]
    skipped: manifest.SkipReport
    audio_seconds: float = 0.0
    compute_seconds: float = 0.0
    wall_seconds: float = 0.0
    done: int = 0
    finished: int = 0


class Decoder(Protocol):
    """Decodes log-probabilities in two steps: ``begin`` starts the search and returns a function, which waits for the
    transcripts. ``jasper_fast.lm.decoders`` has such decoders."""

    def begin(self, log_probs: Tensor, lengths: Tensor, frame_seconds: float) -> Callable[[], list[Transcript]]: ...


Heard = Callable[[], list[Transcript | None]]
Keep = Callable[[int, Tensor], None]
_AHEAD = 2  # with a decoder: how many batches may still be in decoding while the model runs the next one


class Recognizer:
    """Audio to text with a Jasper, on one device: ``recognizer(audio (N, S), lengths (N,)) -> list[Transcript]``.

    Features (``input_val``) and, without a ``vocabulary``, labels are those of ``model.config``. If the configuration
    has no labels and the model has 29 classes, the English alphabet is used. ``dtype`` is the dtype of weights and
    activations, by default the model's; features and sums are always fp32. ``fp32_precision``: as for
    ``InferenceEngine``. The transcript of an utterance does not depend on the batch. Decoding is greedy unless the
    attribute ``decoder`` is set. Raises ValueError if the labels are not known or do not fit the model's classes, and
    if features and model have different numbers of mel bands.
    """

    def __init__(
        self,
        model: Jasper,
        vocabulary: Vocabulary | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        fp32_precision: str | None = None,
    ) -> None:
        config = model.config
        self.device = torch.device(device)
        self.vocabulary = vocabulary or Vocabulary(labels_of(config))
        if self.vocabulary.n_classes != config.decoder.n_classes:
            raise ValueError(
                f"the model has {config.decoder.n_classes} classes, but there are {len(self.vocabulary)} labels and "
                "the blank; give the labels with which it was trained"
            )
        self.audio_settings: dict[str, Any] = (config.input_val or config.input_train).get("audio_dataset") or {}
        bank = {"n_filt": config.encoder.in_feats} | config.filterbank
        self.features = LogMelFeatures.from_config(bank, pad_to_max_duration=False).to(self.device).eval()
        if self.features.n_mels != config.encoder.in_feats:
            raise ValueError(
                f"filterbank_features.n_filt is {self.features.n_mels}, but the model takes {config.encoder.in_feats}"
            )
        self.sample_rate = self.features.sample_rate
        self.engine = InferenceEngine(model.to(self.device).eval(), dtype=dtype, fp32_precision=fp32_precision)
        self.frame_seconds = self.features.hop_length * config.encoder.stride / self.sample_rate
        self.decoder: Decoder | None = None

    def __call__(self, audio: Tensor, lengths: Tensor) -> list[Transcript]:
        return self.begin(audio, lengths)()

    @torch.inference_mode()
    def begin(
        self, audio: Tensor, lengths: Tensor, keep: Callable[[Tensor, Tensor], None] | None = None
    ) -> Callable[[], list[Transcript]]:
        """Runs the model and starts to decode. Returns a function that waits for the transcripts.

        ``keep`` is called with the log-probabilities and their lengths.
        """
        audio, lengths = audio.to(self.device, non_blocking=True), lengths.to(self.device, non_blocking=True)
        log_probs, out_lengths = self.engine(*self.features(audio, lengths))
        if self.decoder is None:
            found = greedy_transcripts(log_probs, out_lengths, self.vocabulary, self.frame_seconds)
            heard = lambda: found  # noqa: E731
        else:
            heard = self.decoder.begin(log_probs, out_lengths, self.frame_seconds)
        if keep is not None:
            keep(log_probs, out_lengths)
        return heard

    def recognize(
        self,
        utterances: Sequence[manifest.Utterance],
        batch_size: int = 16,
        max_seconds: float = 240.0,
        workers: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Recognition:
        """Reads and transcribes utterances in batches of similar length. Unusable utterances are listed in ``skipped``.
        Raises ValueError if there are no utterances, or if all their texts have symbols that are not labels.

        A batch has at most ``batch_size`` utterances and ``max_seconds`` of padded audio; a longer utterance is a batch
        of its own. After each batch ``progress`` is called with the number of utterances that the batch has finished.
        """
        before = 0
        for result in self.stream(utterances, batch_size, max_seconds, workers):
            if progress is not None:
                progress(result.finished - before)
            before = result.finished
        return result

    def stream(
        self,
        utterances: Sequence[manifest.Utterance],
        batch_size: int = 16,
        max_seconds: float = 240.0,
        workers: int = 0,
        window: int | None = None,
        keep: Keep | None = None,
    ) -> Iterator[Recognition]:
        """Like ``recognize``, but yields the same Recognition after each batch, each time with more results.

        With ``window`` utterances are sorted by length only within groups of ``window`` consecutive ones, so that
        ``done`` grows steadily. An utterance is skipped like an unreadable file if the model's output for it is NaN, or
        if memory does not suffice even for a batch of this one utterance. ``keep`` is called with the index and the
        log-probabilities (T', V) of each utterance that is used. With a ``decoder`` the model runs later batches while
        earlier ones are still decoded.
        """
        started = time.perf_counter()
        audio = AudioSettings(self.sample_rate, bool(self.audio_settings.get("trim_silence", False)))
        dataset = SpeechDataset(utterances, self.vocabulary, audio, training=False)
        plan = batches.BatchSampler(dataset.durations, batch_size, max_seconds, shuffle=False, window=window)
        count, left = len(utterances), set(dataset.kept)
        references = [u.text for u in utterances]
        for place, text in zip(dataset.kept, dataset.texts, strict=True):
            references[place] = text
        result = Recognition([None] * count, references, [0.0] * count, dataset.skipped)
        begun: deque[tuple[Batch, list[int], Heard]] = deque()

        def finish() -> Recognition:
            batch, planned, heard = begun.popleft()
            before = time.perf_counter()
            found = heard()
            result.compute_seconds += time.perf_counter() - before
            lengths = batch.audio_lengths.tolist()
            for index, transcript, start, length in zip(batch.indices, found, batch.starts, lengths, strict=True):
                if transcript is not None:
                    place = dataset.kept[index]
                    result.transcripts[place] = transcript.shifted(start)
                    result.seconds[place] = length / self.sample_rate
                    result.audio_seconds += result.seconds[place]
            left.difference_update(dataset.kept[index] for index in planned)
            result.finished = count - len(left)
            while result.done < count and result.done not in left:
                result.done += 1
            result.wall_seconds = time.perf_counter() - started
            return result

        for batch, planned in zip(batches.load_batches(dataset, plan, workers=workers), plan.batches(), strict=True):
            before = time.perf_counter()
            places = [dataset.kept[index] for index in batch.indices]
            begun.append((batch, planned, self._heard(batch, dataset.skipped, places, keep)))
            result.compute_seconds += time.perf_counter() - before
            if len(begun) > (_AHEAD if self.decoder else 0):
                yield finish()
        while begun:
            yield finish()

    def _heard(self, batch: Batch, skipped: manifest.SkipReport, places: list[int], keep: Keep | None) -> Heard:
        """Runs a batch, and returns a function that waits for its transcripts. If the output has a NaN or memory does
        not suffice, each utterance is run by itself, and one that fails again has the transcript None."""
        if not places:
            return list

        try:
            return self.begin(batch.audio, batch.audio_lengths, keep and partial(_keep_each, keep, places))
        except (NotFinite, RuntimeError, MemoryError) as error:
            _why(error)
        begun: list[Heard] = []
        for name, place, audio, length in zip(batch.names, places, batch.audio, batch.audio_lengths, strict=True):
            try:
                begun.append(
                    self.begin(audio[None, :length], length[None], keep and partial(_keep_each, keep, [place]))
                )
            except (NotFinite, RuntimeError, MemoryError) as error:
                reason, cause = _why(error)
                skipped.add([manifest.Skipped(name, reason, f"{name}: {cause}")])
                begun.append(lambda: [None])
        return lambda: [transcript for heard in begun for transcript in heard()]


def _why(error: Exception) -> tuple[str, str]:
    """Returns (reason, cause) of a failure for which an utterance is skipped. Raises any other error again."""
    if isinstance(error, NotFinite):
        return "not_finite", "the output of the model is NaN"
    if no_memory(error):
        return "out_of_memory", f"out of memory: {error}"
    raise error


def _keep_each(keep: Keep, places: list[int], log_probs: Tensor, lengths: Tensor) -> None:
    for place, item, length in zip(places, log_probs, lengths.tolist(), strict=True):
        keep(place, item[:length])


def labels_of(config: Any) -> list[str]:
    """Returns the labels of a configuration, or the English alphabet if it has none. Raises ValueError if the English
    alphabet does not fit the number of classes."""
    if config.labels is not None:
        return list(config.labels)
    if config.decoder.n_classes == len(LABELS) + 1:
        return LABELS
    raise ValueError(
        f"neither the checkpoint nor the configuration has the labels of the {config.decoder.n_classes} classes; "
        "give a configuration with labels"
    )


def load(
    checkpoint: str | os.PathLike,
    config: str | os.PathLike | None = None,
    ema: bool = False,
    device: torch.device | str = "auto",
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    fp32_precision: str | None = None,
) -> Recognizer:
    """Makes a Recognizer from a checkpoint of any kind that ``load_model`` reads.

    ``config``: a YAML file, for a checkpoint without a configuration; ``ema``: use the moving average; ``device``
    "auto" takes a GPU if there is one; ``dtype``, ``fp32_precision``: as for ``Recognizer``. Raises CheckpointError,
    ConfigError, ValueError, BackendMissing or MissingExtra; each message says what to do.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device '{device}' is not available: PyTorch sees no CUDA GPU; use 'cpu' or 'auto'")
    parsed = JasperConfig.from_yaml(config) if config is not None else None
    model = load_model(checkpoint, config=parsed, ema=ema, backend=backend)
    return Recognizer(model, device=device, dtype=dtype, fp32_precision=fp32_precision)
