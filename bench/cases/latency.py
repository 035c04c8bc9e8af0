"""Cases of `python -m bench latency`: a batch from features to log-probabilities, and a batch from sound to text."""

import functools
import gc
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from jasper_fast import InferenceEngine, LogMelFeatures
from jasper_fast.bench.cases import counts, models
from jasper_fast.bench.harness import correct, ratios
from jasper_fast.bench.harness.case import Answer, Case, Contender, Rule, Runner
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.harness.seeds import seeded, stable_seed
from jasper_fast.bench.rivals import choice
from jasper_fast.bench.rivals.eager_layouts import Model
from jasper_fast.speech.decoding import greedy_decode
from jasper_fast.speech.text import Vocabulary

INFERS = ("conv1d.fused",)  # the ops of the engine, by their names in the self-check
SAME_PATH = 0.9  # least share of frames in which the best class of the int8 network must be eager's
SOUND_RIVALS = ("eager", "cuda_graph")
# How the tolerances were chosen. The errors of correct contenders were measured on a CPU with the models small and
# medium, with one and two utterances of 2 s, with one of 7 s and with one of 16.7 s, and with three seeds. The largest,
# divided by eager's error, were, in the RMS norm and in the max norm:
#
#                  all contenders   our engine
#     fp32         2.7   3.5        1.4   1.6    (with fast FIR)
#     fp16, bf16   1.03  1.24       0.78  0.94   (without fast FIR)
#
# A fault that scales one layer by 1.01 has 5000 times eager's error in fp32, and at least 2.6 times eager's error in
# fp16. In bf16 eager's error is 0.5 %, which is twice the effect of that fault, so that only scales from about 1.08 on
# are found. In fp32 eager's error is at most 8.8e-7 of the largest value. Two fp32 contenders of Jasper 10x5 differ by
# at most 2.3e-5 of the largest value.
LOW = correct.Tolerance(factor=2.0, floor=16.0, peak=1.5)
TOLERANCES = {
    torch.float32: correct.Tolerance(factor=4.0, floor=16.0, relative=5e-5),
    torch.float16: LOW,
    torch.bfloat16: LOW,
}


class Models:
    """The weights of a network and the contenders that use them. Cases of all batch sizes use the same contenders.

    `graphs` says whether the engine captures CUDA graphs, see `InferenceEngine`.
    """

    def __init__(self, run: Run, model: str, graphs: bool | Literal["auto"] = "auto") -> None:
        self.run, self.cfg, self.graphs = run, models.config(model), graphs
        self.judged_in = models.exact(self.cfg, run.device)  # the precision of `judge`
        self.contenders: dict[str, Model] = {}
        self.failures: dict[str, Exception] = {}
        self._held: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def state(self) -> dict[str, Tensor]:
        """The weights in fp32."""
        return models.weights(self.cfg, self.run.device)

    @functools.cached_property
    def plain(self) -> nn.Module:
        """The eager model in evaluation mode, in the precision under test."""
        return models.eager(self.cfg, self.state, self.run.dtype).eval().requires_grad_(False)

    @functools.cached_property
    def judge(self) -> nn.Module:
        """The eager model with which contenders are compared."""
        return models.eager(self.cfg, self.state, self.judged_in).eval().requires_grad_(False)

    def answer(self, x: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Returns the answer of `judge` to these features."""
        return self._answer_of(self.judge, self.judged_in, x, lengths)

    def low(self, inputs: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], dict[str, Tensor]] | None:
        """Returns a function that computes the answer of `plain`, whose error sets the tolerance.

        Returns None if `judge` is not more precise than `plain`.
        """
        if self.judged_in == self.run.dtype:
            return None
        return lambda: self._answer_of(self.plain, self.run.dtype, *inputs())

    @staticmethod
    @torch.inference_mode()
    def _answer_of(model: nn.Module, dtype: torch.dtype, x: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        return compared(*model(x.to(dtype), lengths))

    def build(self, name: str, make: Callable[[nn.Module], Model]) -> Model:
        """Returns the contender, which is built at its first use. If building it failed, raises that error again."""
        if name in self.failures:
            raise self.failures[name]
        if name not in self.contenders:
            try:
                self.contenders[name] = make(self.plain)
            except Exception as error:  # the rows of all batch sizes report it
                self.failures[name] = error
                raise
        return self.contenders[name]

    def engine(self, _: nn.Module) -> Model:
        """Returns jasper_fast's inference engine with the same weights."""
        fused = models.fused(self.cfg, self.state, self.run.backend)
        return InferenceEngine(fused.eval(), dtype=self.run.dtype, graphs=self.graphs)

    def close(self) -> None:
        """Frees all models and inputs now, without waiting for the garbage collector."""
        for held in (self.contenders, self.failures, self._held):
            held.clear()
        for made in ("state", "plain", "judge"):
            self.__dict__.pop(made, None)
        gc.collect()

    def inputs(self, N: int, seconds: float) -> tuple[Tensor, Tensor]:
        """Returns features in the precision under test and their lengths. Every call returns the same tensors."""
        if (N, seconds) not in self._held:
            x, lengths = models.features(self.cfg, N, models.FRAMES[seconds], self.run.device, 0)
            self._held[N, seconds] = x.to(self.run.dtype), lengths
        return self._held[N, seconds]

    def refill(self, N: int, seconds: float, seed: int) -> None:
        """Writes new features into the tensor of `inputs`."""
        x, _ = models.features(self.cfg, N, models.FRAMES[seconds], self.run.device, seed)
        self.inputs(N, seconds)[0].copy_(x)


def compared(log_probs: Tensor, lengths: Tensor) -> dict[str, Tensor]:
    """Returns the tensors of an answer that are compared, by name."""
    return {"log_probs": models.valid(log_probs, lengths), "lengths": lengths}


def int8_rule() -> Rule:
    """Returns the rule for a network in int8, which is too imprecise for the usual tolerance.

    The best class of the int8 network must be eager's in at least the share SAME_PATH of the frames.
    """
    words = f"best class equal to eager's in at least {100 * SAME_PATH:.0f} % of the frames; the row has the error"

    def judge(got: Answer, low: Answer | None, ref: Answer, found: dict) -> list[str]:
        frames = got["lengths"].tolist()
        same = (got["log_probs"].argmax(2) == ref["log_probs"].argmax(2)).float()
        share = torch.cat([row[:n] for row, n in zip(same, frames, strict=True)]).mean().item()
        error = (got["log_probs"].double() - ref["log_probs"].double()).abs().max().item()
        found |= {"same_path": share, "max_error": error, "of": ref["log_probs"].abs().max().item()}
        wrong = [] if torch.equal(got["lengths"], ref["lengths"]) else ["lengths: they differ from eager's"]
        if not math.isfinite(error):
            return [*wrong, "log_probs: not all are finite"]
        if share < SAME_PATH:
            wrong.append(f"log_probs: best class equal to eager's in {100 * share:.1f} % of the frames; rule: {words}")
        return wrong

    return Rule("int8", words, judge)


def case(shared: Models, model: str, N: int, seconds: float) -> Case:
    """Returns the case of the acoustic model, for `N` utterances of this many seconds."""
    run, T = shared.run, models.FRAMES[seconds]

    def build(name: str, make: Callable[[nn.Module], Model]) -> Runner:
        call = shared.build(name, make)
        inputs = shared.inputs(N, seconds)

        def timed() -> tuple[Tensor, Tensor]:
            with torch.inference_mode():
                return call(*inputs)

        return Runner(timed, lambda: compared(*timed()), rule=int8_rule() if name == "openvino_int8" else None)

    chosen = choice.choose("inference", run.device, run.rivals)
    if not (run.rivals != "default" or (N, seconds) == (1, 2.0) or run.device.type == "cuda"):
        chosen = {"eager": chosen["eager"]}
    return Case(
        "latency",
        {"model": model, "N": N, "seconds": seconds, "dtype": run.dtype_name, "path": "acoustic model"},
        [
            Contender(n, functools.partial(build, n, make))
            for n, make in ({"jasper_fast": shared.engine} | chosen).items()
        ],
        refill=lambda seed: shared.refill(N, seconds, seed),
        reference=lambda: shared.answer(*shared.inputs(N, seconds)),
        low=shared.low(lambda: shared.inputs(N, seconds)),
        tolerance=TOLERANCES[run.dtype],
        flops=counts.forward_flops(shared.cfg, N, T),
        nbytes=counts.forward_bytes(shared.cfg, N, T, run.dtype.itemsize),
        items=N,
        wall=True,
        needs=models.needs(shared.cfg, INFERS),
        **sampled(run),
    )


def sound_case(shared: Models, model: str, N: int, seconds: float) -> Case:
    """Returns the case from samples to text: log-mel features, the acoustic model, greedy decoding.

    Contenders differ only in the model. Log-probabilities are compared with those of `Models.judge`. Each text is
    compared with the `best_path` of the contender's own log-probabilities, because rounding decides between two nearly
    equal classes. A model with random weights hardly ever repeats a symbol, so the decoder is also checked on
    log-probabilities with repeated symbols.
    """
    run, words = shared.run, Vocabulary()

    @functools.cache
    def sound() -> tuple[nn.Module, Tensor, Tensor]:
        """Returns the front end, samples (N, S) and their lengths (N,)."""
        audio = torch.zeros(N, int(seconds * 16000), device=run.device)
        lengths = torch.full((N,), audio.shape[1], dtype=torch.int64, device=run.device)
        return LogMelFeatures(dither=0.0).to(run.device).eval(), audio, lengths

    def refill(seed: int) -> None:
        g, audio = seeded(stable_seed("audio", seed), run.device), sound()[1]
        audio.copy_(torch.randn(audio.shape, generator=g, device=run.device) * 0.1)

    def features() -> tuple[Tensor, Tensor]:
        front, audio, lengths = sound()
        with torch.inference_mode():
            return front(audio, lengths)

    def build(name: str, make: Callable[[nn.Module], Model]) -> Runner:
        call = shared.build(name, make)
        heard: list[tuple[Tensor, Tensor, list[str]]] = []

        def hear() -> tuple[Tensor, Tensor, list[str]]:
            x, frames = features()
            with torch.inference_mode():
                log_probs, frames = call(x.to(run.dtype), frames)
                return log_probs, frames, greedy_decode(log_probs, frames, words)

        def outputs() -> dict[str, Tensor]:
            heard[:] = [hear()]
            return compared(*heard[0][:2])

        def texts() -> list[str]:
            drawn = repeating(N, heard[0][0].shape[1], words, run.device)
            return misread(*heard.pop(), words) + misread(*drawn, greedy_decode(*drawn, words), words)

        return Runner(hear, outputs, texts)

    chosen = choice.choose("inference", run.device, run.rivals)
    builders = {"jasper_fast": shared.engine} | {n: chosen[n] for n in SOUND_RIVALS if n in chosen}
    return Case(
        "latency",
        {"model": model, "N": N, "seconds": seconds, "dtype": run.dtype_name, "path": "sound to text"},
        [Contender(n, functools.partial(build, n, make)) for n, make in builders.items()],
        refill=refill,
        reference=lambda: shared.answer(*features()),
        low=shared.low(features),
        tolerance=TOLERANCES[run.dtype],
        items=N,
        wall=True,
        needs=models.needs(shared.cfg, INFERS),
        **sampled(run),
    )


def best_path(log_probs: Tensor, length: int, labels: Sequence[str]) -> str:
    """Returns the greedy text of log-probabilities (T, V), computed by its definition. The last class is the blank."""
    best = log_probs[:length].float().argmax(-1).tolist()
    return "".join(labels[k] for k, _ in itertools.groupby(best) if k < len(labels))


def repeating(N: int, T: int, words: Vocabulary, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities (N, T, V) whose best path has only two symbols and the blank, and lengths (N,) from
    T / 2 to T."""
    g = seeded(stable_seed("path"), device)
    path = torch.randint(words.blank - 2, words.blank + 1, (N, T), generator=g, device=device)
    logits = 4.0 * torch.nn.functional.one_hot(path, words.n_classes).float()
    return logits.log_softmax(2), torch.linspace(T, T / 2, N, device=device).long()


def misread(log_probs: Tensor, lengths: Tensor, texts: Sequence[str], words: Vocabulary) -> list[str]:
    """Returns complaints about texts that are not the best paths of the log-probabilities (N, T, V)."""
    if len(texts) != log_probs.shape[0]:
        return [f"text: {len(texts)} texts for {log_probs.shape[0]} utterances"]
    wanted = [best_path(p, n, words.labels) for p, n in zip(log_probs.cpu(), lengths.tolist(), strict=True)]
    return [
        f"text of utterance {i}: {text[:40]!r}, but its best path is {want[:40]!r}"
        for i, (text, want) in enumerate(zip(texts, wanted, strict=True))
        if text != want
    ]


def sampled(run: Run) -> dict[str, float]:
    """Returns the fields `rounds` and `share` of a case on a GPU, and none on a CPU or with `--quick`.

    `rounds` is the number that a P99 needs. If rounds take long, a case ends with fewer rounds after 3x its seconds
    (see `Effort`). `share` halves the seconds, so that such a case takes little longer than other cases.
    """
    if run.device.type != "cuda" or run.quick:
        return {}
    return {"rounds": ratios.SAMPLES["p99"], "share": 0.5}
