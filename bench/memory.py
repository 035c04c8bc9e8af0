"""How many bytes does a training forward keep for its backward, and how many are alive at the worst moment?

`python -m bench memory`; counted, not sampled: every storage born in the second step's forward and alive after it,
however it is held, is one that the step keeps.
"""

import functools
import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bench import counts, cudnn_search, harness, models
from bench.harness import Case, Contender, Run, Runner
from bench.kernels import name as dtype_name
from bench.kineto import recorded
from bench.train import LARGE, TRAINS, Batch, answer, judged_size, precision, tolerance

# (model, N, T)
CPU_GRID = (("jasper10x5", 2, 400), ("small", 8, 400), ("medium", 4, 400))
GPU_GRID = (("jasper10x5", 32, 1680), ("jasper10x5", 2, 400))


class Births(TorchDispatchMode):
    """Watches every op: which storages are born, how many bytes of them are alive, and the most that ever were.

    A storage counts once whatever views it has; those of `before` do not count. Weak references keep identities, so
    that an address used again is not taken for the storage that had it, and keep no bytes. A tensor made inside a
    custom op is seen as its output or as the next op's input; one that also ends there is not seen, but by `peak`.
    """

    def __init__(self, device_type: str, before: dict[int, StorageWeakRef]) -> None:
        super().__init__()
        self.device_type, self.before = device_type, before
        self.parameters: list[nn.Parameter] = []
        self.born: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        grew = False
        for t in tree_iter((args, kwargs, out)):
            if isinstance(t, Tensor) and t.device.type == self.device_type:
                storage = t.untyped_storage()
                if storage._cdata not in self.before and storage._cdata not in self.born:
                    self.born[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    grew = True
        if grew:
            gradients = {p.grad.untyped_storage()._cdata for p in self.parameters if p.grad is not None}
            self.peak = max(self.peak, self.alive(but=gradients))
        return out

    def alive(self, but: Collection[int] = ()) -> int:
        """Bytes born and still alive, those at the addresses `but` left out."""
        for key in [key for key, (ref, _) in self.born.items() if ref.expired()]:
            del self.born[key]
        return sum(nbytes for key, (_, nbytes) in self.born.items() if key not in but)


def reachable(device_type: str) -> dict[int, torch.UntypedStorage]:
    """By address, every storage that a Python tensor on the device holds now."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == device_type and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            found[storage._cdata] = storage
    return found


def kept(forward: Callable[[], Tensor], device: torch.device) -> tuple[int, Births, Tensor]:
    """(bytes kept, what was watched, the loss) of `forward`, whose returned loss holds the graph."""
    gc.collect()
    births = Births(device.type, {key: StorageWeakRef(s) for key, s in reachable(device.type).items()})
    with births:
        loss = forward()
    gc.collect()
    alive = births.alive()
    hidden = {
        key: s.nbytes()
        for key, s in reachable(device.type).items()
        if key not in births.before and key not in births.born
    }
    return alive + sum(hidden.values()), births, loss


def peak(work: Callable[[], object], device_type: str, parameters: Collection[nn.Parameter] = ()) -> int:
    """The most bytes that `work` has allocated at once on the device, the `parameters`' gradients left out.

    Every allocation through PyTorch's allocators counts, those inside C++ and custom ops too. What an op takes from the
    system by itself does not: some of oneDNN's scratch, and the cpu face's, 0.3 MiB a thread at Jasper 10x5.
    """
    with recorded([ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    tree = profiler.profiler.kineto_results.experimental_event_tree()
    events = [e for e in _walk(tree) if e.typed[0] == _EventType.Allocation and e.typed[1].device.type == device_type]
    events.sort(key=lambda e: e.start_time_ns)
    return most_alive(
        [(e.typed[1].ptr, e.typed[1].alloc_size) for e in events],
        but={p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None},
    )


def most_alive(events: Sequence[tuple[int, int]], but: Collection[int] = ()) -> int:
    """The most bytes alive at once, from (address, bytes born or, below zero, freed) in order. Frees of what is older
    do not count, nor what lives at the end at one of the addresses `but`."""
    alive: dict[int, int] = {}
    last = {address: i for i, (address, nbytes) in enumerate(events) if nbytes > 0 and address in but}
    total = most = 0
    for i, (address, nbytes) in enumerate(events):
        if nbytes > 0 and last.get(address) != i:
            alive[address] = nbytes
            total += nbytes
            most = max(most, total)
        elif nbytes < 0:
            total -= alive.pop(address, 0)
    return most


def _walk(events: Iterable) -> Iterator:
    left = list(events)
    while left:  # deeper than Python recurses
        event = left.pop()
        yield event
        left += event.children


def step(module: nn.Module, batch: Batch, dtype: torch.dtype, device: torch.device) -> dict:
    """Bytes of the second training step, dropout on; the first may set up what later steps use again.

    The peak runs over forward and backward, the parameters' gradients left out: every training keeps those. On a CPU it
    is of every allocation; on a GPU of the tensors that ops take and return, `allocator_peak_bytes` beside it.
    """
    module.train()
    forward = lambda: batch.loss(module, dtype)[0]  # noqa: E731
    forward().backward()
    module.zero_grad(set_to_none=True)
    parameters, found = list(module.parameters()), {}

    def counted() -> None:
        found["kept_bytes"], births, loss = kept(forward, device)
        births.parameters = parameters
        with births:
            loss.backward()
        found["peak_bytes"] = births.peak

    if device.type == "cpu":
        found["peak_bytes"] = peak(counted, "cpu", parameters)
    else:
        counted()
    module.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        forward().backward()
        torch.cuda.synchronize(device)
        found["allocator_peak_bytes"] = torch.cuda.max_memory_allocated(device) - start
        module.zero_grad(set_to_none=True)
    return found


def case(run: Run, model: str, N: int, T: int) -> tuple[Case, dict[str, nn.Module], Callable[[], Batch]]:
    """The contenders of one model and batch, for the check that comes before any number.

    Bytes do not depend on what the check runs on, so a large model is checked on a small batch.
    """
    cfg = models.config(model)
    small = counts.parameters(cfg) < LARGE
    state = functools.cache(lambda: models.weights(cfg, run.device))
    batch = functools.cache(lambda: Batch(cfg, N, T, run.device))
    judged_at = (N, T) if small else judged_size(run.device, cfg, N, T) if run.device.type == "cuda" else (2, 64)
    judged = functools.cache(lambda: Batch(cfg, *judged_at, run.device))
    modules: dict[str, nn.Module] = {}

    def runner(name: str, make: Callable[[], nn.Module]) -> Callable[[], Runner]:
        def build() -> Runner:
            module = modules[name] = make()
            return Runner(lambda: None, lambda: answer(module, module, judged(), state(), run.dtype))

        return build

    def plain(dtype: torch.dtype, autocast_dtype: torch.dtype) -> dict[str, Tensor]:
        module = models.eager(cfg, state(), dtype)
        found = answer(module, module, judged(), state(), autocast_dtype)
        roomy = small or run.device.type == "cuda"
        return found if roomy else {name: t.float() for name, t in found.items()}  # half the room for what is compared

    made = Case(
        "memory",
        {
            "model": model,
            "batch": f"({N}, {cfg.encoder.in_feats}, {T})",
            "dtype": dtype_name(run.dtype),
            "mode": "training step",
        },
        [
            Contender("jasper_fast", runner("jasper_fast", lambda: models.fused(cfg, state(), run.backend))),
            Contender("eager", runner("eager", lambda: models.eager(cfg, state()))),
        ],
        refill=lambda seed: judged().refill(seed),
        reference=lambda: plain(torch.float64, torch.float64),
        low=(lambda: plain(torch.float32, run.dtype)) if small or run.device.type == "cuda" else None,
        tolerance=tolerance(precision(run.device, run.dtype)),
        dtype=dtype_name(run.dtype),
        seeds=(1, 2) if small else (1,),
        needs=TRAINS,
    )
    return made, modules, batch


def measure(run: Run, model: str, N: int, T: int) -> list[dict]:
    """Rows of one model and batch: bytes kept for backward and peak bytes, ours and eager's."""
    made, modules, batch = case(run, model, N, T)
    found = {}
    with run.blamed(made):
        for contender in (c for c in made.contenders if c.name not in made.failed):
            with harness.caught(made, contender.name):
                made.runners[contender.name] = contender.build()
        harness.check(made, made.seeds)
        gc.collect()
        for name in list(made.runners):
            with harness.caught(made, name):
                found[name] = step(modules[name], batch(), run.dtype, run.device)
    rows = []
    for contender in made.contenders:
        name = contender.name
        row = {
            "id": f"{made.id} / {name}",
            "bench": "memory",
            "key": made.key,
            "contender": name,
            "ours": name == made.ours,
            "dtype": made.dtype,
            "flops": 0,
            "bytes": 0,
        }
        if name in made.failed:
            row |= dict(zip(("status", "why"), made.failed[name], strict=True))
        else:
            row |= {"status": "ok", "memory": found[name]}
            if name != made.ours and made.ours in found:
                row["memory"] |= {
                    f"ours_over_{kind}": found[made.ours][f"{kind}_bytes"] / found[name][f"{kind}_bytes"]
                    for kind in ("kept", "peak")
                }
        rows.append(row)
    return rows


def main(run: Run, grid: tuple = ()) -> list[dict]:
    """Measure the grid for the device, or the given one."""
    found = []
    usual = GPU_GRID if run.device.type == "cuda" else CPU_GRID
    for model, N, T in grid or usual[: 1 if run.quick else None]:
        done = f"memory model={model} batch=({N}, 64, {T}) dtype={dtype_name(run.dtype)} mode=training step"
        if run.out_of_time() or run.results.has(done, ("jasper_fast", "eager")):
            continue
        gc.collect()
        with harness.console.status(f"memory: count {model} ({N}, 64, {T})"), cudnn_search.off():
            rows = measure(run, model, N, T)
        run.results.add(rows)
        found += rows
    return found
