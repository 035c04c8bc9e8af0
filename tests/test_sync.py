"""SyncBatchNorm over two gloo processes with different batches equals one process with the whole batch."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import worlds
from conftest import interpreted, make_face
from engines import valid
from test_model import config, pair
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from jasper_fast import Jasper, ops
from jasper_fast.dispatch import backends
from jasper_fast.ops import sync

SPLIT = (3, 2)  # utterances per rank
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo")


def spawn(folder: Path, tasks: dict) -> dict:
    """Runs each task (function, *arguments) on both ranks as function(rank, *arguments). Returns {task: [results of
    the ranks]}."""
    worlds.processes(len(SPLIT), folder, _rank, folder, tasks)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(len(SPLIT))]
    return {name: [found[name] for found in ranks] for name in tasks}


def _rank(rank: int, folder: Path, tasks: dict) -> None:
    dist.init_process_group("gloo")
    try:
        torch.save({name: task(rank, *args) for name, (task, *args) in tasks.items()}, folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


# ---- the model ----


def whole_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the features and lengths of all ranks' utterances, and the gradient of their log-probabilities."""
    torch.manual_seed(9)
    n, t = sum(SPLIT), 61
    return torch.randn(n, 8, t), torch.tensor([61, 40, 13, 50, 0]), torch.randn(n, 31, 7)


def step(model: nn.Module, features, lengths, up) -> dict[str, torch.Tensor]:
    """Runs one training step; returns the log-probabilities of valid rows, all gradients and the running statistics."""
    log_probs, out = model.train()(features, lengths)
    valid(log_probs * up, out).sum().backward()
    found = {"log_probs": valid(log_probs.detach(), out)} | {f"grad {k}": p.grad for k, p in model.named_parameters()}
    return found | {f"buffer {k}": v for k, v in model.named_buffers()}


def share(rank: int, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.split(SPLIT)[rank] for t in tensors]


def synced(backend: str, form: str, state: dict, dropout: float = 0.0) -> nn.Module:
    model = Jasper(config("dense", dropout=dropout), backend=backend, panes=form)
    model.load_state_dict(state)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def model_step(rank: int, backend: str, form: str, state: dict) -> dict[str, torch.Tensor]:
    return step(synced(backend, form, state), *share(rank, *whole_batch()))


MODELS = [("reference", "gram"), ("reference", "plain"), ("cpu", "gram"), ("cpu", "plain"), ("triton", "gram")]


@pytest.fixture(scope="module")
def eager() -> nn.Module:
    return pair(config("dense"), "reference")[0]


@pytest.fixture(scope="module")
def two_models(eager, tmp_path_factory) -> dict:
    """The training steps of both ranks, for each of MODELS that can run here."""
    here = [(backend, form) for backend, form in MODELS if backends.is_available(backend)]
    return spawn(tmp_path_factory.mktemp("models"), {of: (model_step, *of, eager.state_dict()) for of in here})


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "form"), MODELS)
def test_two_ranks_equal_one_process(backend, form, eager, two_models):
    """Ranks with 3 and 2 utterances together give the step of one eager model on all 5."""
    interpreted() if backend == "triton" else make_face(backend)
    ranks, eager = two_models[backend, form], copy.deepcopy(eager)
    want = step(eager, *whole_batch())
    torch.testing.assert_close(torch.cat([r["log_probs"] for r in ranks]), want["log_probs"], atol=1e-4, rtol=1e-4)
    for name, value in want.items():
        if name.startswith("grad"):
            summed = sum(r[name] for r in ranks)
            assert (summed - value).abs().max() <= 2e-4 * value.abs().max().clamp_min(1e-6), name
        elif name.startswith("buffer"):
            for rank in ranks:
                torch.testing.assert_close(rank[name], value, atol=1e-5, rtol=1e-4, msg=name)
            assert torch.equal(ranks[0][name], ranks[1][name]), f"{name}: ranks differ"
    alone = step(copy.deepcopy(eager), *share(0, *whole_batch()))
    assert not torch.allclose(alone["log_probs"], ranks[0]["log_probs"], atol=1e-2)


def compiled_step(rank: int, backend: str, form: str, state: dict) -> tuple[int, dict, list[dict[str, torch.Tensor]]]:
    """Returns (graphs, graph breaks, [compiled step, uncompiled step]). The compiled step runs first, while no
    other graph exists."""
    torch._dynamo.reset()
    counters.clear()
    counter, steps = CompileCounterWithBackend("aot_eager"), []
    for compiled in (True, False):
        model = synced(backend, form, state, dropout=0.2)
        if compiled:
            model.compile(backend=counter)
        torch.manual_seed(rank)
        steps.append(step(model, *share(rank, *whole_batch())))
    return counter.frame_count, dict(counters["graph_break"]), steps


@pytest.mark.slow
def test_two_compiled_ranks_equal_themselves_uncompiled(tmp_path, eager):
    """Each rank compiles one graph, although the ranks' batches differ, and gets the results of the uncompiled step."""
    make_face("cpu")
    tasks = {of: (compiled_step, *of, eager.state_dict()) for of in (("reference", "gram"), ("cpu", "plain"))}
    for ranks in spawn(tmp_path, tasks).values():
        for graphs, breaks, (compiled, plain) in ranks:
            assert (graphs, breaks) == (1, {})
            for name, want in plain.items():
                atol = 1e-5 * want.abs().max().item()
                torch.testing.assert_close(compiled[name], want, atol=atol, rtol=1e-4, msg=name)
        for name, value in ranks[0][2][0].items():
            if name.startswith("buffer"):
                assert torch.equal(ranks[1][2][0][name], value), f"{name}: ranks differ"


def test_a_converted_model_alone_is_the_model_itself():
    """Without torch.distributed a converted model gives the same results and has the same names in its state dict."""
    _, ours = pair(config("dense"), "reference")
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(ours))
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    assert converted.state_dict().keys() == ours.state_dict().keys()
    torch.testing.assert_close(step(converted, *whole_batch()), step(ours, *whole_batch()), atol=0, rtol=0)
    with torch.no_grad():
        assert torch.equal(*(m.eval()(*whole_batch()[:2])[0] for m in (ours, converted)))


# ---- the ops, with different T, in fp64 ----

FRAMES = (7, 12)


def op_inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(4)
    t, wide = sum(FRAMES), {"dtype": torch.float64}
    y, residual, up = (torch.randn(1, 5, t, **wide) for _ in range(3))
    xs = [torch.randn(1, c, t, **wide).relu() for c in (3, 4)]
    weights = {f"w{i}": torch.randn(5, x.shape[1], 1, **wide) for i, x in enumerate(xs)}
    gammas = {name: torch.rand(5, **wide) + 0.5 for name in ("gamma", "g0", "g1")}
    betas = {name: torch.randn(5, **wide) for name in ("beta", "b0", "b1")}
    return {"y": y, "residual": residual, "up": up, "x0": xs[0], "x1": xs[1]} | weights | gammas | betas


PARTS = ("y", "residual", "up", "x0", "x1")  # these are split over the ranks


def op_step(rank: int | None, form: str, frames: tuple[int, int] = FRAMES) -> dict[str, torch.Tensor]:
    """Runs two panes, a bn_relu_dropout with their sum in its residual, and a sub_block unless a rank has no frames.
    With `rank` the ops get that rank's frames, and with None all frames."""
    v, group = op_inputs(), None if rank is None else dist.group.WORLD
    if rank is not None:
        v |= {k: v[k].split(frames, 2)[rank] for k in PARTS}
    up = v.pop("up")
    v = {k: t.contiguous().requires_grad_() for k, t in v.items()}
    xs, weights, gammas, betas = ([v[f"{k}{i}"] for i in (0, 1)] for k in "xwgb")
    if form == "gram":
        panes = ops.panes(xs, [ops.gram(x, group) for x in xs], weights, gammas, betas)
    else:
        panes = ops.panes_plain(xs, weights, gammas, betas, backend="reference", group=group)
    running = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    end = {"residual": panes[0] + v["residual"], "backend": "reference", "group": group}
    z = ops.bn_relu_dropout(v["y"], v["gamma"], v["beta"], *running, **end)
    if 0 in frames:  # PyTorch refuses a conv of no frames
        out = z
    else:  # a conv with one tap, so that splitting the frames splits its output
        one = torch.eye(5, dtype=torch.float64)[:, :, None]
        out = ops.sub_block(z, v["gamma"], v["beta"], None, None, one, backend="reference", group=group)
    gradients = dict(zip(v, torch.autograd.grad(out, list(v.values()), up), strict=True))
    return {"out": out.detach(), "mean": panes[1], "var": panes[2], "running": torch.stack(running), **gradients}


@pytest.mark.slow
@pytest.mark.parametrize("frames", [FRAMES, (0, 19)], ids=str)
@pytest.mark.parametrize("form", ["gram", "plain"])
def test_ranks_with_unlike_frames(form, frames, two_ops):
    """Ranks with 7 and 12 frames, or 0 and 19, together give the results of one process with all 19."""
    want, ranks = op_step(None, form, frames), two_ops[form, frames]
    for name, value in want.items():
        if name == "out" or name in PARTS:
            got = torch.cat([r[name] for r in ranks], 2)
        elif name in ("mean", "var", "running"):
            assert torch.equal(ranks[0][name], ranks[1][name]), f"{name}: ranks differ"
            got = ranks[0][name]
        else:
            got = sum(r[name] for r in ranks)
        torch.testing.assert_close(got, value, atol=1e-10, rtol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


def large_means(rank: int) -> tuple[torch.Tensor, ...]:
    y = _offset().split(FRAMES, 2)[rank].contiguous()
    return torch.ops.jasper_fast.bn_sync_stats(*ops.bn_stats(y, "reference"), y.shape[2], sync.name(dist.group.WORLD))


def _offset() -> torch.Tensor:
    torch.manual_seed(6)
    return torch.randn(1, 5, sum(FRAMES)) + 3000.0


@pytest.mark.slow
def test_merged_statistics_do_not_cancel(two_ops):
    ref = _offset().double()
    for mean, m2, rows in two_ops["means"]:
        assert rows == sum(FRAMES)
        assert torch.allclose(mean.double(), ref.mean((0, 2)), rtol=1e-6)
        assert torch.allclose(m2.double(), ref.var((0, 2)) * (sum(FRAMES) - 1), rtol=2e-3)


def few_frames(rank: int, frames: list[list[float]]) -> torch.Tensor:
    y = torch.tensor([[frames[rank]]])
    running = torch.zeros(1), torch.ones(1)
    how = {"backend": "auto", "group": dist.group.WORLD, "momentum": 1.0}
    ops.bn_relu_dropout(y, torch.ones(1), torch.zeros(1), *running, **how)
    return torch.cat(running)


FEW = {"one each": (few_frames, [[1.0], [2.0]]), "none on rank 0": (few_frames, [[], [1.0, 2.0]])}


@pytest.fixture(scope="module")
def two_ops(tmp_path_factory) -> dict:
    """The results of both ranks: of `op_step` by form and frames, of `large_means` as "means", and of FEW."""
    forms = {(form, frames): (op_step, form, frames) for form in ("gram", "plain") for frames in (FRAMES, (0, 19))}
    return spawn(tmp_path_factory.mktemp("ops"), forms | {"means": (large_means,)} | FEW)


@pytest.mark.slow
@pytest.mark.parametrize("frames", FEW)
def test_a_rank_may_have_one_frame_or_none_if_others_have_more(frames, two_ops):
    for running in two_ops[frames]:
        torch.testing.assert_close(running, torch.tensor([1.5, 0.5]))
