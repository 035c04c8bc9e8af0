"""Builds the contenders of `python -m bench tune`: makes inputs that stay in place, forces a tile or calls a face,
compiles in advance in threads, rejects kernels that spill, and captures a CUDA graph."""

import contextlib
import contextvars
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from jasper_fast.bench.cases import common
from jasper_fast.bench.harness import devices
from jasper_fast.bench.harness.case import Case, Contender, Runner
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.rivals import cuda_graphs
from jasper_fast.dispatch import backends
from jasper_fast.kernels import tables
from jasper_fast.kernels.operands import Mask, Norm
from jasper_fast.selfcheck import cases, checks

AHEAD = "all tiles, compiled ahead"  # the name of the trial while no single contender is tried


class Trial:
    """Records on disk which configuration runs for the first time, so that the next process knows if this one dies in
    it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.case, self.key = "", {}
        self.facts: dict[str, dict] = {}

    def begin(self, name: str) -> None:
        """Records that `name` of the current case is about to run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"case": self.case, "key": self.key, "contender": name}))

    def forget(self) -> None:
        """Records that nothing is being tried."""
        self.path.unlink(missing_ok=True)


class Held:
    """The inputs of a case, made on first use and refilled in place, because captured graphs read the same memory."""

    def __init__(self, check: checks.Check, device: torch.device) -> None:
        self.check, self.device = check, device
        self._case: cases.Case | None = None
        self._derived: dict[str, tuple[Callable[[dict[str, Tensor]], Tensor], Tensor]] = {}

    def call(self, *face: str) -> dict[str, Tensor]:
        """The result of the face under test, or of another face, on the inputs."""
        return self.case.ours(*face)

    @property
    def case(self) -> cases.Case:
        """The case of the self-check that holds the inputs and the functions over them."""
        if self._case is None:
            self._case = cases.case(self.check, self.device, 0, timed=True)
        return self._case

    def refill(self, seed: int) -> None:
        """Draws new values for all inputs."""
        new = cases.case(self.check, self.device, seed, timed=True)
        for name, held in self.case.inputs.items():
            held.copy_(new.inputs[name])
        for make, held in self._derived.values():
            held.copy_(make(self.case.inputs))

    def derived(self, name: str, make: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """`make(inputs)`, computed once, and again in place after a refill."""
        if name not in self._derived:
            self._derived[name] = (make, make(self.case.inputs))
        return self._derived[name][1]


@dataclasses.dataclass(frozen=True)
class TunedContender(Contender):
    """A contender with the fields of its row in the table. `call` launches its kernels on the inputs that are
    `held`."""

    row: dict = dataclasses.field(default_factory=dict)
    call: Callable[[], object] | None = None
    held: Held | None = None


def with_tile(held: Held, tile: dict[str, int]) -> dict[str, Tensor]:
    """The result of the conv with this tile."""
    with tables.forced(f"conv1d.{held.check.function}", tile):
        return held.call()


def unfit(run: Run, held: Held, tile: dict[str, int]) -> str | None:
    """Why the conv cannot run with this tile, or None."""
    limit = tables.SHARED_LIMIT.get(capability(run.device), max(tables.SHARED_LIMIT.values()))
    return tables.tile_fault(f"conv1d.{held.check.function}", held.check.dtype, tile, limit)


def tile_builder(
    run: Run, held: Held, tile: dict[str, int], call: Callable[[], dict[str, Tensor]], name: str, trial: Trial
) -> Callable[[], Runner]:
    """Builds a conv with this tile, unless it cannot fit."""

    def build() -> Runner:
        if fault := unfit(run, held, tile):
            raise ValueError(fault)
        return builder(run, held, call, name, trial)()

    return build


def builder(
    run: Run, held: Held, call: Callable[[], dict[str, Tensor]], name: str, trial: Trial
) -> Callable[[], Runner]:
    """Compiles and runs `call` once; rejects it if it spills or breaks the device."""

    def build() -> Runner:
        held.case  # noqa: B018 (makes the inputs now: their kernels are not the candidate's)
        trial.begin(name)
        with compiled() as facts:
            call()
            devices.synchronize(run.device)
        trial.facts[name] = facts
        if facts.get("spilled"):
            raise RuntimeError(f"spills {facts['spilled']} bytes")
        return Runner(replayed(call, run.device), call)

    return build


def norm_of(inputs: dict[str, Tensor]) -> Norm:
    """The batch norm among a check's inputs."""
    return Norm(*(inputs[name] for name in Norm._fields))


def mask_of(inputs: dict[str, Tensor]) -> Mask:
    """The mask and dropout among a check's inputs."""
    return Mask(inputs["lengths"], inputs["seed"], 0.2)


def library_builder(run: Run, held: Held) -> Callable[[], Runner]:
    """The library's replacement for the kernel: its conv and, in training, the pass of batch norm."""
    check = held.check
    s, function = check.shape, check.function
    conv = s.geometry
    aten, bn = backends.face("conv1d", "aten"), backends.face("bn_relu_dropout", "triton")

    def channels_last(inputs: dict[str, Tensor]) -> Tensor:
        return inputs["weight"].to(run.dtype).unsqueeze(2).contiguous(memory_format=torch.channels_last)

    def call() -> dict[str, Tensor]:
        i = held.case.inputs
        # cast once, as autocast's cache and an engine do, and in the memory order to which cuDNN would copy it in every
        # call
        weight = held.derived("weight", channels_last)
        if function == "wgrad":
            return {"dw": aten.wgrad(i["x"], i["dy"], s.k, conv, dtype=torch.float32)}
        if function.startswith("dgrad"):
            dx = aten.dgrad(i["dy"], weight.squeeze(2), s.t, conv)
            if function == "dgrad":
                return {"dx": dx}
            sums = bn.backward_reduce(dx, i["y"], None, norm_of(i), mask_of(i))
            return {"dx": dx} | dict(zip(("dbeta", "dgamma"), sums, strict=True))
        if function == "fused":
            x, bias = i["x"].transpose(1, 2).unsqueeze(2), held.derived("bias", lambda i: i["bias"].to(run.dtype))
            z = F.conv2d(x, weight, bias, (1, s.stride), (0, conv.padding), (1, s.dilation)).squeeze(2)
            z = z.float().log_softmax(1) if check.variant == "log-softmax" else z.relu_()
            return {"z": z.masked_fill_(common.mask(i["out_lengths"], z.shape[2]), 0.0).transpose(1, 2)}
        y = aten.forward(i["x"], weight.squeeze(2), conv)
        return {"y": y} | (dict(zip(("mean", "m2"), bn.stats(y), strict=True)) if function == "forward_stats" else {})

    def outputs() -> dict[str, Tensor]:
        found = call()
        if function == "dgrad_bn":  # g is part of the kernel's epilogue, so it is not timed here
            i, plain = held.case.inputs, backends.face("bn_relu_dropout", "reference")
            found["g"] = plain.backward_apply(found["dx"], i["y"], None, norm_of(i), None, mask_of(i), True)[1]
        return found

    def build() -> Runner:
        call()
        return Runner(replayed(call, run.device), outputs)

    return build


def replayed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`call` as a CUDA graph; on the CPU `call` itself."""
    if device.type != "cuda":
        return call
    graph, _ = cuda_graphs.captured(call)
    return graph.replay


@contextlib.contextmanager
def compiled() -> Iterator[dict]:
    """The compiler's facts about the kernels launched inside, the maximum of each; empty if they are interpreted."""
    from jasper_fast.kernels import launch

    facts: dict[str, int] = {}
    run = launch.run

    def recording(kernel: object, grid: tuple, like: Tensor, *args: object, **meta: object) -> None:
        with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
            built = kernel[tuple(grid)](*args, **meta)
        if built is not None:
            # the driver counts local memory in words of four bytes
            told = {"registers": built.n_regs, "shared": built.metadata.shared, "spilled": 4 * built.n_spills}
            facts.update({k: max(v, facts.get(k, 0)) for k, v in told.items()})

    launch.run = recording
    try:
        yield facts
    finally:
        launch.run = run


def capability(device: torch.device) -> str:
    """sm_90, or that of the largest GPU for the stand-in."""
    if device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def compile_ahead(run: Run, case: Case, trial: Trial) -> None:
    """Compiles all tiles of a case in threads, so that the first calls of the contenders find them compiled.

    A tile that does not compile is reported in its own row when it is tried. If the process dies in here, the next
    process knows and compiles the tiles one by one, to find the cause.
    """
    ours = [c for c in case.contenders if c.row["face"] == "triton"]
    ours = [c for c in ours if c.row["tile"] is None or unfit(run, c.held, c.row["tile"]) is None]
    if len(ours) < 2:
        return
    ours[0].held.case  # noqa: B018 (makes the inputs now: their kernels run, the candidates' are only compiled)
    trial.begin(AHEAD)
    # in its own context, so that an interruption does not leave Triton in asynchronous mode
    contextvars.copy_context().run(_compile_ahead, [c.call for c in ours])
    trial.forget()


def _compile_ahead(calls: list[Callable[[], object]]) -> None:
    import triton

    from jasper_fast.kernels import launch

    def only_compile(kernel: object, grid: tuple, like: Tensor, *args: object, **meta: object) -> None:
        with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
            kernel.run(*args, grid=tuple(grid), warmup=True, **meta)

    run, pool = launch.run, ThreadPoolExecutor(min(16, len(os.sched_getaffinity(0))))
    launch.run = only_compile
    try:
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            try:
                for call in calls:
                    with contextlib.suppress(Exception):
                        call()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        launch.run = run
        pool.shutdown(wait=False, cancel_futures=True)
