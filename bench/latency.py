"""How long does one batch take: percentiles by batch size and audio length, acoustic model alone and sound to text.

`python -m bench latency`; the grid is the reference's, N in 1, 2, 4, 8, 16 by 2, 7, 16.7 s.
"""

import functools
import gc
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench import correct, counts, models, rivals
from bench.harness import Case, Contender, Run, Runner, seeded, stable_seed
from bench.kernels import name as dtype_name
from jasper_fast import InferenceEngine

BATCHES, SECONDS = (1, 2, 4, 8, 16), (2.0, 7.0, 16.7)
GRID = tuple(itertools.product(BATCHES, SECONDS))
CPU_GRID = ((1, 2.0), (1, 7.0), (4, 2.0), (2, 2.0))  # the whole grid takes a small CPU an hour: ask for it with --full
INFERS = ("conv1d.fused",)  # what the engine is made of, as the self-check names it
TOLERANCES = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}


class Models:
    """One network's weights and every contender over them, built at first use and shared by all batch sizes."""

    def __init__(self, run: Run, model: str) -> None:
        self.run, self.cfg = run, models.config(model)
        self.contenders: dict[str, rivals.Model] = {}
        self.failures: dict[str, Exception] = {}
        self._held: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def state(self) -> dict[str, Tensor]:
        """The weights in fp32."""
        return models.weights(self.cfg, self.run.device)

    @functools.cached_property
    def plain(self) -> nn.Module:
        """The eager model in evaluation, in the precision under test."""
        return models.eager(self.cfg, self.state, self.run.dtype).eval().requires_grad_(False)

    @functools.cached_property
    def judge(self) -> nn.Module:
        """The eager model that answers are held against: fp64 where that costs little."""
        small = counts.parameters(self.cfg) < 50e6 or self.run.device.type == "cuda"
        return (
            models.eager(self.cfg, self.state, torch.float64 if small else torch.float32).eval().requires_grad_(False)
        )

    def build(self, name: str, make: Callable[[nn.Module], rivals.Model]) -> rivals.Model:
        """The contender, made at its first use; its failure is remembered and raised again."""
        if name in self.failures:
            raise self.failures[name]
        if name not in self.contenders:
            try:
                self.contenders[name] = make(self.plain)
            except Exception as error:  # the row of every batch size reports it
                self.failures[name] = error
                raise
        return self.contenders[name]

    def engine(self, _: nn.Module) -> rivals.Model:
        """jasper_fast's inference engine over the same weights."""
        fused = models.fused(self.cfg, self.state, self.run.backend)
        return InferenceEngine(fused.eval(), dtype=self.run.dtype)

    def close(self) -> None:
        """Let go of all weights now, not when the collector comes by."""
        for held in (self.contenders, self.failures, self._held):
            held.clear()
        for made in ("state", "plain", "judge"):
            self.__dict__.pop(made, None)
        gc.collect()

    def inputs(self, N: int, seconds: float) -> tuple[Tensor, Tensor]:
        """Features in the precision under test and their lengths, the same tensors at every call."""
        if (N, seconds) not in self._held:
            x, lengths = models.features(self.cfg, N, models.FRAMES[seconds], self.run.device, 0)
            self._held[N, seconds] = x.to(self.run.dtype), lengths
        return self._held[N, seconds]

    def refill(self, N: int, seconds: float, seed: int) -> None:
        """New features in place."""
        x, _ = models.features(self.cfg, N, models.FRAMES[seconds], self.run.device, seed)
        self.inputs(N, seconds)[0].copy_(x)


def case(shared: Models, model: str, N: int, seconds: float) -> Case:
    """The acoustic model alone at one batch size and audio length."""
    run, T = shared.run, models.FRAMES[seconds]

    def contender(name: str, make: Callable[[nn.Module], rivals.Model]) -> Contender:
        def build() -> Runner:
            call = shared.build(name, make)
            inputs = shared.inputs(N, seconds)

            def timed() -> object:
                with torch.inference_mode():
                    return call(*inputs)

            def outputs() -> dict[str, Tensor]:
                log_probs, lengths = timed()
                return {"log_probs": models.valid(log_probs, lengths), "lengths": lengths}

            return Runner(timed, outputs)

        return Contender(name, build)

    def reference() -> dict[str, Tensor]:
        x, lengths = shared.inputs(N, seconds)
        with torch.inference_mode():
            log_probs, lengths = shared.judge(x.to(next(shared.judge.parameters()).dtype), lengths)
        return {"log_probs": models.valid(log_probs, lengths), "lengths": lengths}

    chosen = rivals.choose("inference", run.device, "default" if run.rivals == "compile" else run.rivals)
    if not (run.rivals != "default" or (N, seconds) == (1, 2.0) or run.device.type == "cuda"):
        chosen = {"eager": chosen["eager"]}
    return Case(
        "latency",
        {"model": model, "N": N, "seconds": seconds, "dtype": dtype_name(run.dtype), "path": "acoustic model"},
        [contender("jasper_fast", shared.engine), *(contender(n, b) for n, b in chosen.items())],
        refill=lambda seed: shared.refill(N, seconds, seed),
        reference=reference,
        tolerance=correct.Tolerance(relative=TOLERANCES[run.dtype]),
        flops=counts.forward_flops(shared.cfg, N, T),
        nbytes=counts.forward_bytes(shared.cfg, N, T, run.dtype.itemsize),
        items=N,
        dtype=dtype_name(run.dtype),
        wall=True,
        needs=INFERS,
    )


def sound_case(shared: Models, model: str, N: int, seconds: float) -> Case:
    """From samples to text: log-mel features, the acoustic model, greedy decoding; the model alone differs."""
    from jasper_fast import LogMelFeatures
    from jasper_fast.decoding import greedy_decode
    from jasper_fast.text import Vocabulary

    run, words = shared.run, Vocabulary()

    @functools.cache
    def sound() -> tuple[nn.Module, Tensor, Tensor]:
        """The front end, samples (N, S) and their lengths (N,)."""
        audio = torch.zeros(N, int(seconds * 16000), device=run.device)
        lengths = torch.full((N,), audio.shape[1], dtype=torch.int64, device=run.device)
        return LogMelFeatures(dither=0.0).to(run.device).eval(), audio, lengths

    def refill(seed: int) -> None:
        g, audio = seeded(stable_seed("audio", seed), run.device), sound()[1]
        audio.copy_(torch.randn(audio.shape, generator=g, device=run.device) * 0.1)

    def contender(name: str, make: Callable[[nn.Module], rivals.Model]) -> Contender:
        def build() -> Runner:
            call = shared.build(name, make)
            front, audio, lengths = sound()

            def hear() -> tuple[Tensor, Tensor, list[str]]:
                with torch.inference_mode():
                    x, frames = front(audio, lengths)
                    log_probs, frames = call(x.to(run.dtype), frames)
                    return log_probs, frames, greedy_decode(log_probs, frames, words)

            def outputs() -> dict[str, Tensor]:
                log_probs, frames, _ = hear()
                return {"log_probs": models.valid(log_probs, frames), "lengths": frames}

            return Runner(hear, outputs)

        return Contender(name, build)

    def reference() -> dict[str, Tensor]:
        front, audio, lengths = sound()
        with torch.inference_mode():
            x, frames = front(audio, lengths)
            log_probs, frames = shared.judge(x.to(next(shared.judge.parameters()).dtype), frames)
        return {"log_probs": models.valid(log_probs, frames), "lengths": frames}

    return Case(
        "latency",
        {"model": model, "N": N, "seconds": seconds, "dtype": dtype_name(run.dtype), "path": "sound to text"},
        [contender("jasper_fast", shared.engine), contender("eager", rivals.eager)],
        refill=refill,
        reference=reference,
        tolerance=correct.Tolerance(relative=TOLERANCES[run.dtype]),
        items=N,
        dtype=dtype_name(run.dtype),
        wall=True,
        needs=INFERS,
    )


def main(run: Run, model: str = "jasper10x5", full: bool = False, grid: tuple = ()) -> list[dict]:
    """Measure the grid for the device (all of it on a GPU or with `full`)."""
    shared = Models(run, model)
    everything = full or run.device.type == "cuda"
    usual = GRID if everything else CPU_GRID[: 1 if run.quick else 3 if run.brief else None]
    cases = [case(shared, model, N, seconds) for N, seconds in grid or usual]
    if not run.quick:
        cases.insert(1, sound_case(shared, model, 1, 2.0))
    found = run.cases(f"latency {model}", cases)
    run.close(shared.close)
    return found
