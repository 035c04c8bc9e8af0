"""Cases of `python -m bench decode`: beam searches over given log-probabilities, and after the acoustic model."""

import atexit
import functools
import itertools
import math
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.bench.cases import latency, models
from jasper_fast.bench.harness import correct
from jasper_fast.bench.harness.case import Answer, Case, Contender, Rule, Runner
from jasper_fast.bench.harness.errors import Absent
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.harness.seeds import seeded, stable_seed
from jasper_fast.kernels.prefix_beam import cpu_impl, reference
from jasper_fast.lm.decoders import decoder
from jasper_fast.lm.pool import Pool
from jasper_fast.lm.spelt import SpeltLM
from jasper_fast.lm.symbols import SymbolLM, tokens
from jasper_fast.lm.train import train
from jasper_fast.lm.words import WordLM, WordSearch, word_lm
from jasper_fast.speech.decoding import greedy_decode
from jasper_fast.speech.text import Vocabulary

FRAMES = 835
SECONDS = 16.7  # duration of FRAMES
CHECKED = 25  # number of frames on which answers are compared, because our reference search is slow
SHARP = {"confident": 10.0, "unsure": 3.0}  # added to the logit of each frame's right class
LMS = {"none": "none", "symbols": "6-gram of characters", "words": "3-gram of words, lexicon"}
# (alpha, beta) by language model. beta is 0 for "symbols", because flashlight has no score per symbol.
WEIGHTS = {"none": (0.0, 0.0), "symbols": (1.0, 0.0), "words": (2.0, -0.2)}
_NEAR = 0.1  # flashlight's score may differ from that of our reference search by less than this share
V = Vocabulary()


@functools.cache
def text() -> list[list[str]]:
    """Returns 10,000 lines of eight random words each, from a vocabulary of 5,000 words."""
    rng = random.Random(0)
    words = ["".join(rng.choices(V.labels[1:27], k=rng.randint(2, 8))) for _ in range(5000)]
    return [rng.choices(words, k=8) for _ in range(10000)]


@functools.cache
def language_model(kind: str) -> SymbolLM | WordLM:
    """Returns an n-gram model of the text, of characters or of words."""
    folder = Path(tempfile.mkdtemp(prefix="jasper-fast-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "text").write_text("".join(" ".join(line) + "\n" for line in text()))
    of_words = kind == "words"
    train([folder / "text"], folder / "lm.arpa", 3 if of_words else 6, characters=not of_words)
    return word_lm(folder / "lm.arpa", V) if of_words else SymbolLM(folder / "lm.arpa", V)


@functools.cache
def closed() -> SpeltLM:
    """Returns the model of words for our search. As in flashlight's search with a lexicon, other words are
    impossible."""
    return SpeltLM(language_model("words"), V, unknown=-math.inf)


def posteriors(kind: str, log_probs: Tensor, seed: int) -> None:
    """Fills log_probs (N, T, V) with noise in which the right class of each frame is more probable.

    The right classes spell random lines of the text. In about seven of ten frames they are the blank.
    """
    g, rng = seeded(stable_seed(f"decode {kind}", seed), torch.device("cpu")), random.Random(seed)
    count, frames = log_probs.shape[:2]
    paths = torch.full((count, frames), V.blank)
    for path in paths:
        at = 0
        symbols = (symbol for _ in itertools.count() for symbol in V.encode(" ".join(rng.choice(text())) + " "))
        while at < frames:
            path[at] = next(symbols)
            at += 1 + rng.randint(1, 4)
    logits = torch.randn(log_probs.shape, generator=g)
    sharp = torch.full((count, frames, 1), SHARP[kind])
    log_probs.copy_(logits.scatter_add(2, paths[..., None], sharp).log_softmax(2))


def _settings(kind: str) -> tuple[Any, ...]:
    """Returns the arguments of the prefix search that follow the beam and the number of hypotheses."""
    alpha, beta = WEIGHTS[kind]
    if kind == "words":
        return None, alpha, 0.0, closed().words(alpha, beta)
    return language_model(kind).ngram if kind == "symbols" else None, alpha, beta


def _flashlight(kind: str, beam: int) -> Callable[[np.ndarray], float]:
    """Returns flashlight-text's search, a function that returns the best score of log-probabilities (T, V).

    The search uses a lexicon only if `kind` is "words".
    """
    try:
        from flashlight.lib.text import decoder
        from flashlight.lib.text.decoder.kenlm import KenLM
        from flashlight.lib.text.dictionary import Dictionary
    except ModuleNotFoundError as error:
        raise Absent(f"{error.name} is not installed: pip install 'jasper-fast[lm]'") from error
    alpha, beta = WEIGHTS[kind]
    if kind == "words":
        words = WordSearch(language_model(kind), beam, alpha, beta)
        return lambda row: words(row)[0].score
    options = decoder.LexiconFreeDecoderOptions(beam, V.n_classes, 1e9, alpha, 0.0, True, decoder.CriterionType.CTC)
    model = decoder.ZeroLM()
    if kind == "symbols":
        model = KenLM(language_model(kind).path, Dictionary([*tokens(V), "<blank>"]))
    silence = V.n_classes  # an index that no class has, because our models have no class for silence
    search = decoder.LexiconFreeDecoder(options, model, silence, V.blank, [])
    return lambda row: search.decode(row.ctypes.data, *row.shape)[0].score


def _rule() -> Rule:
    """Returns the rule for flashlight's search, which prunes in another order than ours. So it may find another
    hypothesis, but its score must be close to that of our reference search."""
    words = f"score within {100 * _NEAR:.0f} % of the reference search's"

    def judge(got: Answer, low: Answer | None, ref: Answer, found: dict) -> list[str]:
        share = ((got["score"] - ref["score"]) / ref["score"].abs().clamp(min=1)).tolist()
        found["score_over_reference"] = share
        return [] if all(abs(s) < _NEAR for s in share) else [f"score: {share}; {words}"]

    return Rule("another beam", words, judge)


def search_case(kind: str, beam: int, lm: str, utterances: int = 1, threads: int = 1) -> Case:
    """Returns the case of the search only, compared with flashlight-text at the same beam. `lm` is one of LMS.

    Our search uses `threads` threads. flashlight, which holds Python's lock, uses the same number of processes. With
    more than one it takes part only if `lm` is "words".
    """
    log_probs = torch.empty(utterances, FRAMES, V.n_classes)
    whole, short = (torch.full((utterances,), n) for n in (FRAMES, CHECKED))

    def search(lengths: Tensor) -> Tensor:
        had = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return cpu_impl.search(log_probs, lengths, beam, 1, *_settings(lm))[2][:, 0, 0]
        finally:
            torch.set_num_threads(had)

    def theirs() -> Runner:
        alone = _flashlight(lm, beam)
        rows = lambda frames: [np.ascontiguousarray(row[:frames].numpy()) for row in log_probs]  # noqa: E731
        answer = lambda: {"score": torch.tensor([*map(alone, rows(CHECKED))], dtype=torch.float64)}  # noqa: E731
        if threads == 1:
            return Runner(lambda: [*map(alone, rows(FRAMES))], answer, rule=_rule())
        pool = Pool(language_model("words"), threads, beam=beam, alpha=WEIGHTS[lm][0], beta=WEIGHTS[lm][1])
        return Runner(lambda: pool.submit(rows(FRAMES), WEIGHTS[lm])(), answer, rule=_rule())

    return Case(
        "decode",
        {"posteriors": kind, "lm": LMS[lm], "beam": beam, "utterances": utterances, "audio_s": SECONDS,
         "threads": threads, "path": "log-probs to text"},
        [Contender("jasper_fast", lambda: Runner(lambda: search(whole), lambda: {"score": search(short)})),
         *([Contender("flashlight", theirs)] if threads == 1 or lm == "words" else [])],
        refill=lambda seed: posteriors(kind, log_probs, seed),
        reference=lambda: {"score": reference.search(log_probs, short, beam, 1, *_settings(lm))[2][:, 0, 0]},
        tolerance=correct.Tolerance(relative=1e-9),
        items=utterances,
        wall=True,
        seeds=(1,),
    )  # fmt: skip


def whole_case(shared: latency.Models, run: Run, model: str, seconds: float, beam: int, lm: str) -> Case:
    """Returns the case from features to text with a beam search, compared with greedy decoding after the same engine.

    One minus the ratio greedy / beam search is the share of the time that the search takes. The case has only one
    utterance, so that the search and the model do not run at the same time.
    """
    inputs = shared.inputs(1, seconds)

    def build(searched: bool) -> Runner:
        call = shared.build("jasper_fast", shared.engine)
        alpha, beta = WEIGHTS[lm]
        search = decoder(V, language_model(lm) if lm != "none" else None, beam=beam, alpha=alpha, beta=beta)

        def timed() -> tuple[Tensor, Tensor]:
            with torch.inference_mode():
                log_probs, lengths = call(*inputs)
                if searched:
                    search.begin(log_probs, lengths, 0.02)()
                else:
                    greedy_decode(log_probs, lengths, V)
                return log_probs, lengths

        return Runner(timed, lambda: latency.compared(*timed()))

    return Case(
        "decode",
        {"model": model, "audio_s": seconds, "dtype": run.dtype_name, "lm": LMS[lm], "beam": beam,
         "path": "features to text"},
        [Contender("jasper_fast", lambda: build(True)), Contender("greedy", lambda: build(False))],
        refill=lambda seed: shared.refill(1, seconds, seed),
        reference=lambda: shared.answer(*inputs),
        low=shared.low(lambda: inputs),
        tolerance=latency.TOLERANCES[run.dtype],
        items=1,
        wall=True,
        seeds=(1,),
        needs=models.needs(shared.cfg, latency.INFERS),
    )  # fmt: skip
