"""Fused beside eager, alternating in one process: training steps, inference, bytes kept for backward."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from jasper_fast import InferenceEngine, Jasper, JasperConfig, NovoGrad
from jasper_fast.nn.eager import EagerJasper
from jasper_fast.training.step import ctc_loss


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleave(
    eager: Callable[[], object], fused: Callable[[], object], device: torch.device, seconds: float, least: int = 5
) -> tuple[list[float], list[float]]:
    """Seconds per call of both, called in turn for about `seconds` and at least `least` times each, after warming up.

    Who goes first alternates, so that neither always runs in the other's wake.
    """
    times: tuple[list[float], list[float]] = ([], [])
    sides = ((0, eager), (1, fused))
    for call in (eager, fused) * 2:
        call()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[0]) < least:
        for which, call in sides if len(times[0]) % 2 else sides[::-1]:
            begin = _clock(device)
            call()
            times[which].append(_clock(device) - begin)
    return times


def _rates(times: tuple[list[float], list[float]], utterances: int) -> dict[str, float]:
    eager, fused = (statistics.median(t) for t in times)
    return {
        "eager_utterances_per_second": utterances / eager,
        "fused_utterances_per_second": utterances / fused,
        "ratio": eager / fused,
        "rounds": len(times[0]),
    }


def _step(model: nn.Module, features: Tensor, lengths: Tensor, targets: Tensor, sizes: Tensor) -> Callable[[], None]:
    """One training step: forward, CTC, backward, NovoGrad; the same but for the model. Its rate is too low to learn."""
    optimizer = NovoGrad(model.parameters(), lr=1e-6)
    model.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        log_probs, out = model(features, lengths)
        ctc_loss(log_probs, out, targets, sizes).mean().backward()
        optimizer.step()

    return step


class _Storages(TorchDispatchMode):
    """Watches every op and remembers, weakly, each storage that it touches, with its size."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_iter((args, kwargs, out)):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self.seen or self.seen[key][0].expired():  # an address may be used again
                    self.seen[key] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def alive(self) -> dict[int, int]:
        return {key: size for key, (ref, size) in self.seen.items() if not ref.expired()}


def kept_for_backward(model: nn.Module, features: Tensor, lengths: Tensor) -> int:
    """Bytes of the storages born in the second training forward of `model` and alive after it, however held."""
    model.train()
    model(features, lengths)[0].sum().backward()  # sets up what later steps use again
    model.zero_grad(set_to_none=True)
    with _Storages() as watched:
        held = [model.state_dict(), features, lengths]
        first = model(features, lengths)[0]
        del first
        gc.collect()
        before = set(watched.alive())
        output = model(features, lengths)[0]
        gc.collect()
        alive = watched.alive()
    del output, held
    return sum(size for key, size in alive.items() if key not in before)


def compare(
    config: JasperConfig,
    state: dict[str, Tensor],
    batch: tuple[Tensor, Tensor, Tensor, Tensor],
    one: tuple[Tensor, Tensor],
    device: torch.device,
    seconds: float = 12.0,
) -> dict[str, dict]:
    """Measures `Jasper` (backend "auto") and `EagerJasper`, both holding `state`.

    `batch`: features (N, C, T), lengths (N,), targets and their lengths of a training step; `one`: features and lengths
    of an utterance to transcribe; all on `device`. Returns `train`, `inference` (utterances per second; `ratio`: eager
    time over fused time, medians) and `memory` (bytes that one training forward keeps for backward).
    """
    eager, fused = EagerJasper(config).to(device), Jasper(config).to(device)
    for model in (eager, fused):
        model.load_state_dict(state)
    engine = InferenceEngine(fused.eval())
    eager.eval()

    @torch.no_grad()
    def listen() -> None:
        eager(*one)

    inference = _rates(interleave(listen, lambda: engine(*one), device, seconds / 3), len(one[1]))
    train = _rates(
        interleave(_step(eager, *batch), _step(fused, *batch), device, seconds * 2 / 3),
        len(batch[1]),
    )
    eager.train(), fused.train()
    memory = {f"{name}_bytes": kept_for_backward(m, *batch[:2]) for name, m in (("eager", eager), ("fused", fused))}
    shape = f"{len(batch[1])} utterances, {batch[0].shape[2] / 100:.1f} s"
    train["shape"] = memory["shape"] = shape
    inference["shape"] = f"1 utterance, {one[0].shape[2] / 100:.1f} s"
    return {"train": train, "inference": inference, "memory": memory}
