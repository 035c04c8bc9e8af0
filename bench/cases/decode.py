"""Cases of `python -m bench decode`: beam searches over log-probs, alone and behind the acoustic model."""

from __future__ import annotations

import functools
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jasper_fast.bench.cases import latency
from jasper_fast.bench.harness import correct
from jasper_fast.bench.harness.case import Answer, Case, Contender, Rule, Runner
from jasper_fast.bench.harness.errors import Absent
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.harness.seeds import seeded, stable_seed
from jasper_fast.kernels.prefix_beam import cpu_impl, reference
from jasper_fast.lm.search import beam_search
from jasper_fast.lm.symbols import SymbolLM, tokens
from jasper_fast.lm.train import train
from jasper_fast.speech.decoding import greedy_decode
from jasper_fast.speech.text import Vocabulary

FRAMES, UTTERANCES = 835, 1  # 16.7 s
CHECKED = 60  # frames that answers are compared on: the definition is slow
SHARP = {"confident": 10.0, "unsure": 3.0}  # how far the classes that are meant stand out, in logits
ALPHA = 1.0  # flashlight adds nothing for a symbol, so beta is 0
_LOWER = 0.1  # of the score
V = Vocabulary()


@functools.cache
def symbol_lm() -> tuple[Path, SymbolLM]:
    """A 6-gram of characters of random words, with the file that it lies in."""
    rng, folder = random.Random(0), Path(tempfile.mkdtemp(prefix="jasper-fast-bench-"))
    words = ["".join(rng.choices(V.labels[1:27], k=rng.randint(2, 8))) for _ in range(300)]
    text = folder / "text"
    text.write_text("".join(" ".join(rng.choices(words, k=8)) + "\n" for _ in range(2000)))
    train([text], folder / "lm.arpa", 6, characters=True)
    return folder / "lm.arpa", SymbolLM(folder / "lm.arpa", V)


def posteriors(kind: str, log_probs: Tensor, seed: int) -> None:
    """Fills log_probs (N, T, V): noise, and over it a path of seven blanks in ten frames."""
    g = seeded(stable_seed(f"decode {kind}", seed), torch.device("cpu"))
    shape = log_probs.shape[:2]
    path = torch.randint(V.blank, shape, generator=g).masked_fill(torch.rand(shape, generator=g) < 0.7, V.blank)
    logits = torch.randn(log_probs.shape, generator=g)
    log_probs.copy_(logits.scatter_add(2, path[..., None], torch.full((*shape, 1), SHARP[kind])).log_softmax(2))


def _flashlight(beam: int, lm: Path | None) -> Callable[[Tensor, int], list[float]]:
    """flashlight-text's search without a lexicon: the best scores of log-probs (N, T, V), the first frames of each."""
    try:
        from flashlight.lib.text import decoder
        from flashlight.lib.text.decoder.kenlm import KenLM
        from flashlight.lib.text.dictionary import Dictionary
    except ModuleNotFoundError as error:
        raise Absent(f"{error.name} is not installed: pip install 'jasper-fast[lm]'") from error
    ctc = decoder.CriterionType.CTC
    options = decoder.LexiconFreeDecoderOptions(beam, V.n_classes, 1e9, ALPHA, 0.0, True, ctc)
    model = KenLM(str(lm), Dictionary([*tokens(V), "<blank>"])) if lm else decoder.ZeroLM()
    search = decoder.LexiconFreeDecoder(options, model, V.n_classes, V.blank, [])  # no class is a silence of its own

    def run(log_probs: Tensor, frames: int) -> list[float]:
        rows = [np.ascontiguousarray(row[:frames].numpy()) for row in log_probs]
        return [search.decode(row.ctypes.data, *row.shape)[0].score for row in rows]

    return run


def _rule() -> Rule:
    """Of another search: it prunes in its own order, and what it finds can only be less probable, or hardly more."""
    words = f"score at most {100 * _LOWER:.0f} % below the definition's"

    def judge(got: Answer, low: Answer | None, ref: Answer) -> list[str]:
        share = ((got["score"] - ref["score"]) / ref["score"].abs().clamp(min=1)).tolist()
        rule.found["score_over_reference"] = share
        return [] if all(-_LOWER < s < _LOWER for s in share) else [f"score: {share}; {words}"]

    rule = Rule("another beam", words, judge)
    return rule


def search_case(kind: str, beam: int, fused: bool) -> Case:
    """The search alone, beside flashlight-text at the same beam, over all symbols and without a threshold."""
    log_probs = torch.empty(UTTERANCES, FRAMES, V.n_classes)
    whole, short = (torch.full((UTTERANCES,), n) for n in (FRAMES, CHECKED))

    def weights() -> tuple[Any, float, float]:
        return (symbol_lm()[1].ngram, ALPHA, 0.0) if fused else (None, 0.0, 0.0)

    def ours() -> Runner:
        lm = weights()
        outputs = lambda: {"score": cpu_impl.search(log_probs, short, beam, 1, *lm)[2][:, 0, 0]}  # noqa: E731
        return Runner(lambda: cpu_impl.search(log_probs, whole, beam, 1, *lm), outputs)

    def theirs() -> Runner:
        search = _flashlight(beam, symbol_lm()[0] if fused else None)
        outputs = lambda: {"score": torch.tensor(search(log_probs, CHECKED), dtype=torch.float64)}  # noqa: E731
        return Runner(lambda: search(log_probs, FRAMES), outputs, rule=_rule())

    return Case(
        "decode",
        {"posteriors": kind, "lm": "6-gram of characters" if fused else "none", "beam": beam,
         "threads": torch.get_num_threads(), "path": "log-probs to text"},
        [Contender("jasper_fast", ours), Contender("flashlight", theirs)],
        refill=lambda seed: posteriors(kind, log_probs, seed),
        reference=lambda: {"score": reference.search(log_probs, short, beam, 1, *weights())[2][:, 0, 0]},
        tolerance=correct.Tolerance(relative=1e-9),
        items=UTTERANCES,
        wall=True,
        seeds=(1,),
    )  # fmt: skip


def whole_case(shared: latency.Models, run: Run, model: str, seconds: float, beam: int) -> Case:
    """Features to text with a beam search and a symbol n-gram, beside greedy decoding of the same engine: how much of
    the time the search takes is one less the ratio."""
    inputs = shared.inputs(1, seconds)

    def hear(beam: int | None) -> Callable[[], Runner]:
        def build() -> Runner:
            call = shared.build("jasper_fast", shared.engine)

            def timed() -> tuple[Tensor, Tensor]:
                with torch.inference_mode():
                    log_probs, lengths = call(*inputs)
                    if beam is None:
                        greedy_decode(log_probs, lengths, V)
                    else:
                        beam_search(log_probs, lengths, V, beam=beam, lm=symbol_lm()[1], alpha=ALPHA)
                    return log_probs, lengths

            return Runner(timed, lambda: latency.told(*timed()))

        return build

    return Case(
        "decode",
        {"model": model, "seconds": seconds, "dtype": run.dtype_name, "beam": beam, "path": "features to text"},
        [Contender("jasper_fast", hear(beam)), Contender("greedy", hear(None))],
        refill=lambda seed: shared.refill(1, seconds, seed),
        reference=lambda: shared.answer(*inputs),
        low=shared.low(lambda: inputs),
        tolerance=latency.TOLERANCES[run.dtype],
        items=1,
        wall=True,
        seeds=(1,),
        needs=latency.INFERS,
    )
