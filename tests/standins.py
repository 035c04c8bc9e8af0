"""Stand-ins for several test files: verdicts, a cache folder, tables and tuning of an imaginary GPU, spies.

A test file uses a fixture by importing it from here. An imported autouse fixture applies to all tests of that file.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jasper_fast.dispatch import backends, children, choose, tuned, verdicts
from jasper_fast.dispatch.verdict import GOOD, Verdict
from jasper_fast.kernels import likeness, tables
from jasper_fast.kernels.conv1d import cuda_launch, cuda_tiles
from jasper_fast.selfcheck.checks import Conv
from jasper_fast.tuning import work
from jasper_fast.tuning.faces import Proposal

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GPU_NAME = "NVIDIA Imaginary 9000"
NORM = "bn_relu_dropout"
BF16, FP16, FP32 = "bfloat16", "float16", "float32"
SHAPE = (256, 256, 11, 1, 1)  # of a conv in a table: its channels, taps, stride and dilation
CONV = Conv(2, 21, 24, 20, 5)  # small inputs for a check


def verdict(op: str = "conv1d", status: str = GOOD, face: str = "triton", **more) -> Verdict:
    """Returns the verdict of a full check in bf16. `more` sets further fields."""
    values = {
        "dtype": "bfloat16", "quick": False, "checked": 3,
        "failure": "" if status == GOOD else "dgrad (2, 64->48, 37) wrong: 7 %",
    }  # fmt: skip
    return Verdict(op, face, status=status, **(values | more), date="2026-01-01T00:00:00+00:00")


@pytest.fixture(name="own_cache", autouse=True)
def verdicts_of_its_own(tmp_path, monkeypatch):
    """Gives the test its own cache folder, and clears the choices that dispatch remembers."""
    monkeypatch.setenv("JASPER_FAST_CACHE", str(tmp_path / "cache"))
    choose.forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    choose.forget()


@pytest.fixture(name="put_table")
def imaginary_gpus_table(tmp_path, monkeypatch):
    """Returns a function that writes rows as a GPU's table, and returns its path. `gpu` names another GPU than the
    imaginary one."""
    where = tmp_path / "tables"
    monkeypatch.setenv("JASPER_FAST_TABLES", str(where))
    monkeypatch.setattr(tables, "_gpu_name", lambda index: GPU_NAME)
    tables._index.cache_clear()

    def put(rows: list[tables.Row], **header: str):
        header = dict.fromkeys(tables.HEADER, "x") | {"gpu": GPU_NAME, "capability": "sm_90"} | header
        path = where / f"{tables.slug(header['gpu'])}.json"
        tables.write(path, header, rows)
        tables._index.cache_clear()
        return path

    yield put
    tables._index.cache_clear()


def pretend_a_gpu(monkeypatch, traits: likeness.Traits | None) -> None:
    """Pretends that there is an sm_90 GPU with these traits, on which every face runs."""
    key = {"device": GPU_NAME, "driver": "580", "torch": "2.13.0", "triton": "3.7.1", "sources": "abc"}
    for owner, name, stand_in in (
        (backends, "why_missing", lambda backend, device: None),
        (cuda_launch, "gpu", lambda device: cuda_tiles.Gpu(90, 132, 232448)),
        (likeness, "traits", lambda index: traits),
        (tables, "_gpu_name", lambda index: GPU_NAME),
        (tables, "forget", tables._index.cache_clear),
        (verdicts, "key", lambda device: key),
        (verdicts, "forget", verdicts._memory.clear),
    ):
        monkeypatch.setattr(owner, name, stand_in)


# Ops that need the values of a tensor on the host, by the names under which they are dispatched
READS = (
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "allclose", "bincount",
    "_unique2", "unique_dim", "unique_consecutive",
)  # fmt: skip


class NeverWait(TorchDispatchMode):
    """Fails on any op that needs the values of a tensor on the host. On a GPU the host would wait for them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READS, name
        if name in ("index", "index_put", "index_put_"):
            assert torch.bool not in {i.dtype for i in args[1] if i is not None}, f"{name} by a mask"
        return func(*args, **(kwargs or {}))


def novograd_functions(launched: list[str]) -> SimpleNamespace:
    """Stands in for NovoGrad's CUDA functions. Each call adds the name of its kernel to `launched`."""
    return SimpleNamespace(
        jf_novograd_squares=lambda *how: launched.append("squares"),
        jf_novograd_update=lambda *how: launched.append("update"),
    )


TRAITS = likeness.Traits("sm_90", 132, 3.35e12)
TILES = [
    {"t": t, "n": 64, "k": 32, "num_warps": 4, "num_stages": stages, "splits": 1} for t, stages in ((64, 3), (128, 3))
]
CONTENDERS = {  # seconds of each contender, by name
    "triton 64x64x32 warps 4 stages 3": 2e-3,
    "triton 128x64x32 warps 4 stages 3": 1e-3,
    "aten library": 1.5e-3,
    "triton direct": 1e-3,
    "reference library": 1.5e-3,
}


def conv_rows(times: dict[str, tuple[float, float]], *dtypes: str) -> list[tables.Row]:
    """Returns the rows of a table for convs of SHAPE. `times` is {op: (seconds of triton, seconds of aten)}."""
    faces = ("triton", "direct", TILES[0]), ("aten", "library", None)
    return [
        tables.Row(op, dtype, *SHAPE, 12, *face, spent)
        for (op, spans), dtype in itertools.product(times.items(), dtypes)
        for face, spent in zip(faces, spans, strict=True)
    ]


@dataclasses.dataclass
class Tuning:
    """An imaginary GPU for tuning. Its clock advances only when a contender runs.

    `seconds`: the time of each contender. `wrong`: the fault that the compiler or the check finds in a contender.
    `measured`: the cells whose measurement has begun. `sessions`: the number of cells in each tuning process.
    `happen(what)` is called at every event, and may raise.
    """

    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict(CONTENDERS))
    wrong: dict[str, str] = dataclasses.field(default_factory=dict)
    measured: list[tables.Cell] = dataclasses.field(default_factory=list)
    sessions: list[int] = dataclasses.field(default_factory=list)
    happen: Callable[[str], None] = lambda what: None
    now: float = 0.0

    # the next three are the methods of `timing.Wall`, where `seconds_of` is called `seconds`

    def warm(self, call: str) -> None:
        self.now += 1.0

    def prepare(self, call: str) -> str:
        return call

    def seconds_of(self, call: str, times: int) -> float:
        self.now += times * self.seconds[call]
        return times * self.seconds[call]

    def proposals(self, cell: tables.Cell, device: torch.device) -> list[Proposal]:
        """Proposes two tiles and the library for a conv, and the two faces for a norm."""
        if cell.op.startswith("bn"):
            return [Proposal("triton"), Proposal("reference", "library")]
        return [*(Proposal("triton", tile=tile) for tile in TILES), Proposal("aten", "library")]

    def talk(self, argv, wanted, hear, seconds) -> children.Ended:
        """Like `children.talk`, but in this process. Messages are converted to JSON and back, as between processes."""
        wanted = json.loads(json.dumps(wanted))
        self.sessions.append(len(wanted["cells"]))
        told = False

        def tell(kind: str, value: object) -> None:
            nonlocal told
            if kind == "begin" and value[0] not in self.measured[-1:]:
                self.measured.append(tables.Cell(*value[0]))
            self.happen(kind)
            told = hear(kind, json.loads(json.dumps(value)))
            self.happen(f"after {kind}")

        ticker = SimpleNamespace(warm=self.warm, prepare=self.prepare, seconds=self.seconds_of)
        more = {"without": wanted["without"], "clock": lambda: self.now, "ticker": ticker, "proposals": self.proposals}
        try:
            work.Tuner(GPU, tell, budget=wanted["budget"], **more).run(wanted["cells"])
        except Died as error:
            return children.Ended(False, False, error.code, f"ended with status {error.code}", ": a kernel's last word")
        return children.Ended(told, False, 0, "", "")


class Died(SystemExit):
    """Ends the pretended tuning process with the exit status `code`."""


@pytest.fixture(name="tuning")
def tuning_on_an_imaginary_gpu(own_cache, monkeypatch, tmp_path):
    """Turns on first-use tuning, with the imaginary GPU and good verdicts."""
    made = Tuning()

    def held(cell, device):
        return SimpleNamespace(call=lambda proposal: proposal.name(cell), free=lambda: None)

    def perform(check, device):
        face = Proposal(check.face, tile=check.tile).name(tables.Cell("conv1d.forward", "float16", 1, 1, 1, 1, 1, 0))
        why = made.wrong.get(face)
        return {"status": "wrong" if why else "ok", "detail": why or ""}

    monkeypatch.setenv("JASPER_FAST_TUNE", "1")
    monkeypatch.setenv("JASPER_FAST_TABLES", str(tmp_path / "tables"))
    pretend_a_gpu(monkeypatch, TRAITS)
    monkeypatch.setattr(tuned, "rows", lambda index: tuned.read(GPU))
    for owner, name, stand_in in (
        (work, "Held", held),
        (work.perform, "perform", perform),
        (work.Tuner, "_wait", lambda self: None),
        (children, "talk", made.talk),
        (tables, "_over", tuned.rows),
        (verdicts, "verdict", lambda op, face, device, dtype: verdict(op, face=face, dtype=dtype)),
    ):
        monkeypatch.setattr(owner, name, stand_in)
    choose.forget()
    yield made
    tables._index.cache_clear()


def forked(*bodies) -> list[int]:
    """Runs each of `bodies` in its own forked process, all at the same time. Returns their wait statuses: 0 for a body
    that returned, 256 for one that raised an error, or the number of the signal that ended the process."""
    pids = []
    for body in bodies:
        pids.append(os.fork())
        if pids[-1] == 0:
            try:
                body()
                os._exit(0)
            finally:
                os._exit(1)  # only if the body raised an error
    return [os.waitpid(pid, 0)[1] for pid in pids]


def wrap(monkeypatch, owner: object, name: str, around) -> None:
    """Replaces `owner.name` by a function that calls `around` with the original function and the arguments."""
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **more: around(right, *args, **more))


def spied(monkeypatch, owner: object, name: str, note=lambda *args, **more: args) -> list:
    """Makes each call of `owner.name` append `note(*args, **more)` to the returned list, and then run as before."""
    calls: list = []

    def around(right, *args, **more):
        calls.append(note(*args, **more))
        return right(*args, **more)

    wrap(monkeypatch, owner, name, around)
    return calls
