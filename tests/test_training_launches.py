"""A training step on the Triton face with launches recorded and not run: its launches, saved bytes and waits.

The kernels are tested elsewhere; here only the host's part of a step runs, so that Jasper 10x5 is counted in seconds.
"""

from __future__ import annotations

import collections
import copy
import io
import pickle

import pytest
import torch
from conftest import interpreted, settle
from test_model import batch, config, pair
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from jasper_fast import Jasper
from jasper_fast.bench.cases import models
from jasper_fast.bench.harness import allocations
from jasper_fast.kernels import launch
from jasper_fast.nn.eager import EagerJasper

BLOCKS, CONVS, PANES = 6, 9, 1 + 2 + 3  # of config("dense"): its repeats are 1, 2, 3, 1, 1, 1


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The name of every kernel launched, in order, with the flags that are set; nothing runs."""
    interpreted()
    told: list[str] = []

    def record(kernel, grid, like, *args, **meta):
        assert all(g > 0 for g in grid), (kernel, grid)
        shown = ("HAS_STATS", "HAS_NORM", "HAS_HALO")
        flags = [k.removeprefix("HAS_").lower() for k, on in meta.items() if k in shown and on]
        told.append(" ".join([kernel.fn.__name__.strip("_").removesuffix("_kernel"), *flags]))

    monkeypatch.setattr(launch, "run", record)
    return told


def model(form: str, **more) -> Jasper:
    torch.manual_seed(0)
    return Jasper(config("dense", **more), backend="triton", panes=form).train()


@pytest.mark.parametrize("form", ["gram", "plain"])
def test_a_step_runs_no_conv_twice_and_takes_no_pass_for_statistics(launches, form):
    ours = model(form, dropout=0.2)
    log_probs, _ = ours(*batch())
    forward = collections.Counter(launches)
    launches.clear()
    log_probs.sum().backward()
    backward = collections.Counter(launches)
    inside = CONVS - BLOCKS  # convs that follow another in their block
    want = {"conv1d_pack": CONVS, "conv1d_forward stats": CONVS, "conv1d_stats_merge": CONVS, "forward": CONVS}
    if form == "plain":  # a pane's output does not come from conv1d, so its statistics need a pass
        want |= {"stats": PANES, "stats_merge": PANES}
    assert forward == want
    assert backward == {
        "conv1d_wgrad": CONVS,
        "conv1d_wgrad_merge": CONVS,
        "conv1d_dgrad": BLOCKS - 1,  # the features need no gradient
        "conv1d_dgrad norm": inside,
        "conv1d_sums_merge": inside,
        "forward": inside,  # z, made again
        "backward_reduce": BLOCKS,  # block outputs have several readers
        "sum_merge": BLOCKS,
        "backward_apply halo": CONVS,
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", ["gram", "plain"])
def test_a_step_waits_for_nothing(launches, form, training, monkeypatch):
    """No tensor is read on the host: not by a method of Tensor, nor by an op whose result's size depends on values."""
    ours, (features, lengths) = model(form, dropout=0.2).train(training), batch()

    def refuse(name):
        def read(*args, **kwargs):
            raise AssertionError(f"Tensor.{name} waits for the device")

        return read

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"), name
            by_mask = name in ("index", "index_put", "index_put_") and torch.bool in {
                i.dtype for i in args[1] if i is not None
            }
            assert not by_mask, f"{name} by a mask"
            return func(*args, **(kwargs or {}))

    reads = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")
    for name in reads:
        monkeypatch.setattr(Tensor, name, refuse(name))
    with pytest.raises(AssertionError, match="waits for the device"):
        bool(lengths[0] > 0)
    with Watch(), pytest.raises(AssertionError, match="by a mask"):
        torch.ones(3)[torch.tensor([True, False, True])]
    with Watch():
        log_probs, _ = ours(features, lengths)
        log_probs.sum().backward()
    monkeypatch.undo()
    assert launches


def kept(module: torch.nn.Module, n: int, t: int) -> int:
    """Bytes of storages created in the second training forward and alive after it (as in `python -m bench memory`)."""
    device = next(module.parameters()).device
    features = torch.zeros(n, 64, t, device=device)
    lengths = torch.full((n,), t, device=device)
    forward = lambda: module(features, lengths)[0].square().mean()  # noqa: E731
    forward()
    return allocations.kept(forward, device)[0]


@pytest.mark.slow
def test_a_step_keeps_a_quarter_of_what_eager_keeps(launches):
    """Jasper 10x5: conv and block outputs are 0.21 of eager's bytes. The Gram form keeps three quarters of a covariance
    for each block output beside them, whatever the batch."""
    cfg = models.config("jasper10x5")
    with torch.device("meta"):
        eager = kept(EagerJasper(cfg).train(), 2, 400)
    ours, shares = Jasper(cfg, backend="triton").train(), {}
    for form in ("gram", "plain"):
        for layer in ours.encoder.layers:
            layer.pane_form = form
        shares[form] = kept(ours, 2, 400) / eager
    assert 0.15 < shares["plain"] < shares["gram"] <= 0.25, shares
    with torch.autocast("cpu", torch.bfloat16):  # activations halve, and no 16-bit copy of a weight is kept
        assert kept(ours, 2, 400) <= 0.52 * eager * shares["plain"]


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


def test_packs_are_in_no_state_dict_and_no_copy(launches):
    ours = model("gram")
    before = list(ours.state_dict())
    ours(*batch())
    assert list(ours.state_dict()) == before
    assert packs(ours)
    twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    held = io.BytesIO()
    torch.save(ours, held)
    held.seek(0)
    twins.append(torch.load(held, weights_only=False))
    for twin in twins:
        assert not packs(twin)
        twin(*batch())
        assert len(packs(twin)) == CONVS
        assert {p.data_ptr() for p in packs(twin).values()}.isdisjoint(p.data_ptr() for p in packs(ours).values())


@pytest.mark.slow
def test_a_forward_takes_the_weights_as_they_are_now():
    """With real launches: after the weights change in place, the next forward equals that of a new model with them."""
    settle("triton")
    _, ours = pair(config("none"), "triton")
    features, lengths = batch()
    ours.eval()
    with torch.no_grad():
        ours(features, lengths)
        for parameter in ours.parameters():
            parameter.mul_(1.5)
    fresh = Jasper(config("none"), backend="triton").eval()
    fresh.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(features, lengths)[0], fresh(features, lengths)[0])
