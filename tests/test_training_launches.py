"""A training step on the Triton face with recorded launches: its kernels, the bytes that it saves, and that the host
never waits.

Launches are recorded, not run, so a step of Jasper 10x5 takes seconds. Other tests check the kernels.
"""

import collections
import copy
import dataclasses
import pickle

import pytest
import torch
from conftest import interpreted, raising, settle
from standins import NeverWait, novograd_functions
from test_model import batch, config, pair
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jasper_fast import Jasper, NovoGrad
from jasper_fast.bench.cases import models
from jasper_fast.bench.harness import allocations
from jasper_fast.kernels import launch
from jasper_fast.kernels.conv1d import aten_impl
from jasper_fast.kernels.novograd import cuda_launch, table
from jasper_fast.nn.eager import EagerJasper
from jasper_fast.training import step
from jasper_fast.training.optim import EMA

# config("dense") has 6 blocks, with 1, 2, 3, 1, 1 and 1 convs. Its three residual blocks have 1, 2 and 3 panes.
BLOCKS, CONVS, PANES = 6, 9, 1 + 2 + 3


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """Records each launch as the kernel's name and those flags of `shown` that are on. No kernel runs."""
    interpreted()
    launched: list[str] = []

    def record(kernel, grid, like, *args, **meta):
        assert all(g > 0 for g in grid), (kernel, grid)
        shown = ("HAS_STATS", "HAS_NORM", "HAS_HALO", "IS_DIRECT")
        flags = [k.partition("_")[2].lower() for k, on in meta.items() if k in shown and on]
        launched.append(" ".join([kernel.fn.__name__.strip("_").removesuffix("_kernel"), *flags]))

    monkeypatch.setattr(launch, "run", record)
    return launched


def model(form: str, **more) -> Jasper:
    return Jasper(config("dense", **more), backend="triton", panes=form).train()


@pytest.mark.parametrize("form", ["gram", "plain"])
def test_a_step_runs_no_conv_twice_and_takes_no_pass_for_statistics(launches, form):
    log_probs, _ = model(form, dropout=0.2)(*batch())
    forward = collections.Counter(launches)
    launches.clear()
    log_probs.sum().backward()
    backward = collections.Counter(launches)
    inside = CONVS - BLOCKS  # convs that follow another conv of their block
    want = {"conv1d_pack": CONVS, "conv1d_forward stats": CONVS, "conv1d_stats_merge": CONVS, "forward": CONVS}
    # PyTorch computes the outputs of plain panes, so their statistics need a pass of their own
    assert forward == want | ({"stats": PANES, "stats_merge": PANES} if form == "plain" else {})
    assert backward == {
        "conv1d_wgrad": CONVS - 1,
        "conv1d_wgrad_merge": CONVS - 1,
        "conv1d_wgrad direct": 1,  # its sum is not split into parts, so nothing is merged
        "conv1d_dgrad": BLOCKS - 1,  # the features need no gradient
        "conv1d_dgrad norm": inside,
        "conv1d_sums_merge": inside + BLOCKS,  # merges the partial sums of dgrad, and of backward_reduce
        "forward": inside,  # computes z again
        "backward_reduce": BLOCKS,  # dgrad cannot make these sums where a block ends: its gradient has more parts
        "backward_apply halo": CONVS,
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", ["gram", "plain"])
def test_a_step_waits_for_nothing(launches, form, training, monkeypatch):
    """The host reads no tensor, neither by a method of Tensor nor by an op whose output size depends on values."""
    ours, (features, lengths) = model(form, dropout=0.2).train(training), batch()
    for name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(Tensor, name, raising(AssertionError(f"Tensor.{name} waits for the device")))
    with pytest.raises(AssertionError, match="waits for the device"):
        bool(lengths[0] > 0)
    with NeverWait(), pytest.raises(AssertionError, match="by a mask"):
        torch.ones(3)[torch.tensor([True, False, True])]
    with NeverWait():
        log_probs, _ = ours(features, lengths)
        log_probs.sum().backward()
    monkeypatch.undo()
    assert launches


def kept(module: torch.nn.Module) -> int:
    """Returns the bytes that the second training forward allocates and keeps for backward, as `bench memory` does."""
    device = next(module.parameters()).device
    features, lengths = torch.zeros(2, 64, 400, device=device), torch.full((2,), 400, device=device)
    forward = lambda: module(features, lengths)[0].square().mean()  # noqa: E731
    forward()
    return allocations.kept(forward, device)[0]


@pytest.mark.slow
def test_a_step_keeps_a_quarter_of_what_eager_keeps(launches):
    """A step of Jasper 10x5 saves the outputs of convs and blocks, 0.21 of the bytes that eager saves. The Gram form
    also saves covariances, whose size does not depend on the batch."""
    cfg = models.config("jasper10x5")
    with torch.device("meta"):
        eager = kept(EagerJasper(cfg).train())
        ours, shares = Jasper(cfg, backend="triton").train().to_empty(device="cpu"), {}  # uninitialised
    for form in ("gram", "plain"):
        for layer in ours.encoder.layers:
            layer.pane_form = form
        shares[form] = kept(ours) / eager
    assert 0.15 < shares["plain"] < shares["gram"] <= 0.25, shares
    with torch.autocast("cpu", torch.bfloat16):  # activations have half the size, and no 16-bit weights are kept
        assert kept(ours) <= 0.52 * eager * shares["plain"]


# ---- the packs that modules own ----


def packs(ours: Jasper) -> dict[tuple[int, int], Tensor]:
    return {(b, i): p for b, layer in enumerate(ours.encoder.layers) for i, p in layer.packs._held.items()}


def test_packs_are_made_once_and_filled_in_every_forward(launches):
    ours = model("gram")
    ours(*batch())
    first = {k: p.data_ptr() for k, p in packs(ours).items()}
    assert len(first) == CONVS
    ours(*batch())
    assert {k: p.data_ptr() for k, p in packs(ours).items()} == first
    assert launches.count("conv1d_pack") == 2 * CONVS
    with torch.autocast("cpu", torch.bfloat16):
        ours(*batch())
    assert {p.dtype for p in packs(ours).values()} == {torch.bfloat16}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_packs_are_in_no_state_dict_and_no_copy(launches, copied):
    ours = model("gram")
    before = list(ours.state_dict())
    ours(*batch())
    assert list(ours.state_dict()) == before and packs(ours)
    twin = copied(ours)
    assert not packs(twin)
    twin(*batch())
    assert len(packs(twin)) == CONVS
    assert {p.data_ptr() for p in packs(twin).values()}.isdisjoint(p.data_ptr() for p in packs(ours).values())


def test_plain_convs_have_packs_in_16_bits_only_and_those_made_in_inference_mode_serve_training():
    ours = Jasper(config("dense"), backend="reference").train()
    ours(*batch())
    assert not packs(ours), "convs in fp32 need none"
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            ours.eval()(*batch())
        assert packs(ours)
        ours.train()(*batch())[0].sum().backward()


@pytest.mark.parametrize("form", ["gram", "plain"])
def test_plain_convs_cast_and_turn_a_weight_once_a_step(form, monkeypatch):
    """Each weight is cast once per step, into a buffer of its module. The results are nearly those without buffers."""
    ours, (features, lengths) = Jasper(config("dense", dropout=0.0), backend="reference", panes=form).train(), batch()
    found = []
    for packs_or_not in (True, False):
        if not packs_or_not:
            monkeypatch.setattr(aten_impl, "packs", lambda weight, dtype: False)
        for _ in range(2):  # the first step makes the buffers
            ours.zero_grad()
            with Dispatched() as seen, torch.autocast("cpu", torch.bfloat16):
                log_probs, _ = ours(features, lengths)
            with seen:
                (log_probs * torch.linspace(-1, 1, log_probs.shape[2])).sum().backward()
        found.append((seen.count.total(), log_probs.detach(), *(p.grad for p in ours.parameters())))
        assert [pack.dtype for pack in packs(ours).values()] == [torch.bfloat16] * CONVS
    (with_packs, *a), (without, *b) = found
    # without packs, a conv inside a block casts its weight twice
    assert with_packs <= without - (CONVS - BLOCKS), (with_packs, without)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-2 * y.abs().max().item())


@pytest.mark.slow
def test_a_forward_takes_the_weights_as_they_are_now():
    """A forward pass with changed weights equals that of a new model, with real launches."""
    settle("triton")
    (_, ours), given = pair(config("none"), "triton"), batch()
    fresh = Jasper(config("none"), backend="triton").eval()
    with torch.no_grad():
        ours.eval()(*given)
        for parameter in ours.parameters():
            parameter.mul_(1.5)
        fresh.load_state_dict(ours.state_dict())
        assert torch.equal(ours(*given)[0], fresh(*given)[0])


# ---- the optimiser's step ----

# Limits of one launch of ATen's multi-tensor kernels: the number of tensors, which depends on the number of tensor
# lists, and the number of chunks of 64 Ki elements
TENSORS, CHUNKS, CHUNK = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 65536


def multi_tensor(lists: int, sizes: list[int]) -> int:
    """Returns the number of launches of a foreach op on tensors of `sizes`. A launch ends at a limit; the rest of its
    last tensor is then part of the next launch."""
    launches = tensors = chunks = 0
    for i, size in enumerate(sizes):
        tensors += size > 0
        count = -(-size // CHUNK)
        for chunk in range(count):
            chunks += 1
            over = chunk == count - 1
            if (tensors == TENSORS[lists] and over) or chunks == CHUNKS or (over and i == len(sizes) - 1):
                launches += 1
                tensors, chunks = int(not over), 0
    return launches


class Dispatched(TorchDispatchMode):
    """Counts the launches that ATen ops would need on a GPU: one per op, the number that `multi_tensor` returns per
    foreach op, and none for views and allocations."""

    NONE = ("view", "_unsafe_view", "transpose", "t", "unsqueeze", "squeeze", "slice", "select", "detach", "expand",
            "alias", "as_strided", "unbind", "split", "empty", "empty_like", "empty_strided", "new_empty", "reshape",
            "new_empty_strided", "permute", "split_with_sizes", "lift_fresh", "_local_scalar_dense", "numpy_T",
            "_reshape_alias")  # fmt: skip
    PERHAPS = ("to", "flatten", "reshape", "contiguous")  # copy or view

    def __init__(self) -> None:
        super().__init__()
        self.count: collections.Counter = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if func.namespace == "jasper_fast":  # count the ops that our op calls
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        if name.startswith("_foreach"):
            lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
            lists = [a for a in lists if a[0].dim() or a is lists[0]]  # lists of scalars become kernel arguments
            self.count[name] += multi_tensor(len(lists), [t.numel() for t in lists[0]])
        elif name not in self.NONE + self.PERHAPS:
            self.count[name] += 1
        out = func(*args, **kwargs)
        if name in self.PERHAPS:
            self.count[name] += out.untyped_storage()._cdata != args[0].untyped_storage()._cdata
        return out


@pytest.mark.parametrize(
    ("lists", "sizes", "launches"),
    [(2, [10] * 64, 1), (2, [10] * 65, 2), (3, [10] * 97, 3), (2, [CHUNK * CHUNKS], 1), (2, [CHUNK * CHUNKS + 1], 2)],
)
def test_atens_rule(lists, sizes, launches):
    assert multi_tensor(lists, sizes) == launches


def hollow_training(name: str) -> tuple[Jasper, EMA]:
    """Returns the model called `name` and its moving average, with gradients, on the meta device."""
    with torch.device("meta"):
        ours = Jasper(models.config(name), backend="triton", panes="gram").train()
    for p in ours.parameters():
        p.grad = torch.empty_like(p)
    return ours, EMA(ours)


@pytest.mark.parametrize("face", ["triton", "cuda", "reference"])
def test_the_optimiser_and_the_average_are_two_launches(launches, face, monkeypatch):
    """The update of Jasper 10x5 and its average are two kernels and a few small copies. PyTorch's foreach ops, on the
    reference face, make hundreds of launches."""
    ours, ema = hollow_training("jasper10x5")
    monkeypatch.setattr(cuda_launch, "functions", lambda: novograd_functions(launches))
    monkeypatch.setattr(NovoGrad, "_face", lambda self, device, params: face)
    optimizer = NovoGrad(ours.parameters(), lr=0.01, weight_decay=1e-3, ema=ema)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step.update(ours, optimizer, scaler)  # makes the optimiser's state
    launches.clear()
    optimizer.param_groups[0]["lr"] = 0.009  # a schedule changes it in every step
    with Dispatched() as seen:
        step.update(ours, optimizer, scaler)
    total = len(launches) + seen.count.total()
    assert total > 400 if face == "reference" else (launches == ["squares", "update"] and total <= 6), seen.count


def test_the_step_moves_32_bytes_a_parameter(launches):
    """The table that the Triton and CUDA kernels read shows how many bytes a step moves."""
    ours, ema = hollow_training("small")
    optimizer = NovoGrad(ours.parameters(), ema=ema, backend="triton")
    step.update(ours, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    rows = optimizer._held[torch.device("meta")]["rows"]
    # bytes per element; UPDATE reads the gradient for its norm, then reads four values and writes three
    moved = {table.UPDATE: 4 + 16 + 12, table.AVERAGE: 12, table.COPY: 8}
    count, others = (sum(x.numel() for x in tensors) for tensors in (ours.parameters(), ours.buffers()))
    assert 32 * count < sum(row[5] * moved[row[7]] for row in rows) <= 32 * count + 24 * others


@pytest.mark.parametrize(
    ("form", "amp", "ceiling"),
    # before our optimiser kernels and with separate statistics for each pane, the counts were 4,782, 5,314 and 3,649
    [("gram", None, 2300), ("gram", torch.bfloat16, 2600), ("plain", torch.bfloat16, 2850)],
)
def test_a_training_step_launches_so_many_kernels_and_ops(launches, form, amp, ceiling):
    """Counts the launches of a step of Jasper 10x5 without frontend and loss, which make about 15 more. The model has a
    sixteenth of the channels, whose number does not change the count."""
    cfg = models.config("jasper10x5")
    blocks = [dataclasses.replace(b, filters=b.filters // 16) for b in cfg.encoder.blocks]
    decoder = dataclasses.replace(cfg.decoder, in_feats=cfg.decoder.in_feats // 16)
    cfg = dataclasses.replace(cfg, encoder=dataclasses.replace(cfg.encoder, blocks=blocks), decoder=decoder)
    ours = Jasper(cfg, backend="triton", panes=form).train()
    optimizer = NovoGrad(ours.parameters(), lr=0.01, weight_decay=1e-3, ema=EMA(ours), backend="triton")
    scaler, guard = torch.amp.GradScaler("cpu", enabled=False), step.BufferGuard(ours)
    features, lengths = torch.randn(2, 64, 64), torch.tensor([64, 50])

    def run():
        guard.remember()
        optimizer.zero_grad()
        with torch.autocast("cpu", amp, enabled=amp is not None):
            log_probs, _ = ours(features, lengths)
        log_probs.sum().backward()
        guard.settle(torch.ones((), dtype=torch.bool))
        step.update(ours, optimizer, scaler)

    run()
    launches.clear()
    with Dispatched() as seen:
        run()
    assert 450 < len(launches) < 600  # our kernels; the rest are ATen's
    assert ceiling - 300 < len(launches) + seen.count.total() <= ceiling, seen.count
