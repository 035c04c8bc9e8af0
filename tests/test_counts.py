"""The FLOPs that bench counts are those of PyTorch's counter, and its bytes are those of the tensors that kernels get.

For all convs and norms of Jasper 10x5, Triton's launches are recorded and not run.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from bench_runs import CPU, make_run
from conftest import interpreted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from jasper_fast import InferenceEngine, Jasper, ops
from jasper_fast.bench.cases import bn_relu_dropout, common, counts, models, panes, sub_block_inference, sub_blocks
from jasper_fast.bench.cases.layers import layers
from jasper_fast.kernels import launch
from jasper_fast.kernels.panes import gram
from jasper_fast.nn.eager import EagerJasper

N, T = 3, 40  # no conv has N taps, so a tensor whose first dimension is N is an activation
PADDED = 32  # output channels of the decoder's packed weight
LAYERS = layers()
INNER = [layer for layer in LAYERS if not layer.first]


@pytest.fixture
def launches() -> Iterator[list[tuple[str, list[torch.Size]]]]:
    """Yields a list of (kernel, shapes of its tensors of three dimensions), one for each launch. No kernel runs."""
    interpreted()
    seen: list[tuple[str, list[torch.Size]]] = []

    def take(one: launch.Launch) -> None:
        shapes = [a.shape for a in one.arguments.values() if isinstance(a, torch.Tensor) and a.dim() == 3]
        seen.append((one.name.strip("_").removesuffix("_kernel"), shapes))

    with launch.recorded(take):
        yield seen


@pytest.fixture(scope="module")
def jasper10x5():
    return models.config("jasper10x5")


def network(config) -> EagerJasper:
    with torch.device("meta"):
        return EagerJasper(config)


def moved(launches) -> int:
    """Returns how many elements of activations and weights the launches have moved, and clears the list.

    Packing, merging and the zeros that pad the decoder's packed weight from 29 to 32 channels do not count.
    """
    total = 0
    for name, tensors in launches:
        for t in tensors if name not in ("conv1d_pack", "conv1d_wgrad_merge") else ():
            padded = name.startswith("conv1d") and t[0] != N and t[-1] == PADDED
            total += t.numel() // PADDED * models.VOCABULARY if padded else t.numel()
    launches.clear()
    return total


@pytest.fixture(scope="module")
def hollow(jasper10x5) -> Jasper:
    """A model with uninitialised weights, which no test reads."""
    with torch.device("meta"):
        return Jasper(jasper10x5, backend="triton", panes="gram").to_empty(device="cpu")


@pytest.fixture
def eager(jasper10x5) -> EagerJasper:
    return network(jasper10x5)


# ------------------------------------------------------------------ the whole network


def test_every_norm_of_jasper_10x5_is_counted_where_it_stands(jasper10x5, eager):
    seen, T = {}, 416
    for name, module in eager.named_modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y.numel()}))
    with torch.device("meta"):
        eager(torch.empty(N, 64, T), torch.empty(N, dtype=torch.int64))
    found, convs = {}, list(counts.convs(jasper10x5, N, T))
    for conv in convs:
        if conv.batch_norm:
            stem, last = conv.name.rsplit(".", 1)
            found[f"{stem}.{int(last) + 1}"] = conv.output
    assert found == seen and len(found) == 108
    assert Counter(conv.place for conv in convs) == {"inner": 40, "joined": 10, "end": 3, "pane": 55, "head": 1}


def test_every_conv_of_jasper_10x5_is_counted_as_pytorch_counts_it(jasper10x5, eager):
    T, seen = 416, {}

    def record(name, module, inputs, output):
        weights = sum(p.numel() for p in module.parameters())
        seen[name] = (weights, 2 * (inputs[0].numel() + weights + output.numel()), output.shape[2])

    for name, module in eager.named_modules():
        if isinstance(module, torch.nn.Conv1d):
            module.register_forward_hook(functools.partial(record, name))
    flops = FlopCounterMode(display=False, depth=8)
    with flops, torch.device("meta"):
        eager(torch.empty(N, 64, T), torch.empty(N, dtype=torch.int64))
    by_module = {k.removeprefix("EagerJasper."): v for k, v in flops.get_flop_counts().items()}
    ours = {conv.name: conv for conv in counts.convs(jasper10x5, N, T)}
    assert list(ours) == list(seen) and len(ours) == 109
    for name, conv in ours.items():
        bias = conv.N * conv.T_out * conv.C_out if conv.bias else 0  # PyTorch's counter leaves the bias out
        assert sum(by_module[name].values()) == conv.flops - bias, name
        assert (conv.weights, conv.nbytes(2), conv.T_out) == seen[name], name


def test_jasper_10x5_totals(jasper10x5, eager):
    assert counts.parameters(jasper10x5) == sum(p.numel() for p in eager.parameters()) == 332_632_349
    assert counts.forward_flops(jasper10x5, 1, 1680) / 840 == pytest.approx(0.665e9, rel=1e-3)
    assert counts.forward_flops(jasper10x5, 1, 208) == pytest.approx(69e9, rel=0.01)


def test_quartznets_counts_are_its_models():
    """Unlike Jasper, QuartzNet has convs with groups."""
    config = models.config("quartznet15x5")
    model = network(config).eval()
    assert counts.parameters(config) == sum(p.numel() for p in model.parameters()) == 18_924_381
    found = {f"{conv.name}.weight" for conv in counts.convs(config, 1, 64)}
    assert found == {name for name, p in model.named_parameters() if p.dim() == 3}
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(2, 64, 208, device="meta"), torch.empty(2, dtype=torch.int64, device="meta"))
    assert abs(counts.forward_flops(config, 2, 208) / counter.get_total_flops() - 1) < 1e-3


@pytest.mark.slow
def test_training_flops_of_jasper_10x5_are_pytorchs(jasper10x5, eager):
    T = 208
    with FlopCounterMode(display=False) as flops, torch.device("meta"):
        log_probs, _ = eager(torch.empty(N, 64, T), torch.empty(N, dtype=torch.int64))
        log_probs.backward(torch.empty_like(log_probs))
    bias = 3 * N * (T // 2) * models.VOCABULARY  # PyTorch's counter leaves the decoder's bias out
    assert counts.training_flops(jasper10x5, N, T) == flops.get_total_flops() + bias
    assert counts.forward_flops(jasper10x5, N, T) < counts.training_flops(jasper10x5, N, T) / 2.99


@pytest.mark.slow
def test_training_bytes_are_what_a_step_of_jasper_10x5_moves(jasper10x5, hollow, eager, launches):
    """The bytes of a step are those of Triton's launches, and those of the eager modules for panes and decoder, which
    run in ATen."""
    T = 64
    log_probs, _ = hollow.train()(torch.zeros(N, 64, T), torch.full((N,), T))
    log_probs.sum().backward()
    names = [name for name, _ in launches]
    assert names.count("conv1d_forward") == names.count("conv1d_wgrad") == 53 and names.count("stats") == 0
    # `moved` leaves out the merge kernel. The gradients that this kernel writes count, not the shares that it reads.
    gradients = sum(t.numel() for name, ts in launches if name == "conv1d_wgrad_merge" for t in ts)
    main = moved(launches) + gradients

    sizes: list[int] = []
    for block in eager.encoder.layers:
        for k, (conv, norm) in enumerate(getattr(block, "res", ())):
            conv.register_forward_hook(lambda m, x, y: sizes.append(x[0].numel() + m.weight.numel()))
            if k == 0:
                norm.register_forward_hook(lambda m, x, y: sizes.append(y.numel()))  # the sum, once per block
    eager.decoder.layers[0].register_forward_hook(
        lambda m, x, y: sizes.append(x[0].numel() + y.numel() + sum(p.numel() for p in m.parameters()))
    )
    with torch.device("meta"):
        eager(torch.empty(N, 64, T), torch.empty(N, dtype=torch.int64))
    assert len(sizes) == 55 + 10 + 1
    assert counts.training_bytes(jasper10x5, N, T, 2) == 2 * (main + 3 * sum(sizes))


@pytest.mark.slow
def test_forward_bytes_are_what_the_engine_moves(jasper10x5, hollow, launches):
    T = 128
    engine = InferenceEngine(hollow.eval(), graphs=False, bucket=1)
    launches.clear()  # drops the launches that packed the weights
    engine(torch.zeros(N, 64, T), torch.full((N,), T))
    assert [name for name, _ in launches] == ["conv1d_fused"] * 54
    assert counts.forward_bytes(jasper10x5, N, T, 4) == 4 * (moved(launches) + models.VOCABULARY)  # and a bias


# ------------------------------------------------------------------ the ops


@pytest.mark.parametrize("residual", [False, True])
def test_bytes_of_bn_relu_dropout_are_what_its_kernels_move(residual, launches):
    C = 24
    y, dz, r = (torch.zeros(N, T, C).transpose(1, 2).requires_grad_() for _ in range(3))
    gamma, beta = (torch.zeros(C, requires_grad=True) for _ in range(2))
    more = {"residual": r if residual else None, "lengths": torch.full((N,), T), "p": 0.2, "backend": "triton"}
    z = ops.bn_relu_dropout(y, gamma, beta, None, None, **more)
    count = lambda mode: counts.bn_relu_dropout_bytes(N, C, T, 2, mode, residual)  # noqa: E731
    assert count("forward") == 2 * moved(launches)
    z.backward(dz.detach())
    assert {"backward_reduce", "backward_apply"} < {name for name, _ in launches}
    assert count("backward") == 2 * moved(launches)
    assert count("both") == count("forward") + count("backward")


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("layer", INNER, ids=lambda a: f"{a.C_in}-{a.C_out}-{a.K}")
def test_bytes_of_sub_blocks_are_what_their_kernels_move(layer, statistics, launches):
    y = torch.zeros(N, T, layer.C_in).transpose(1, 2).requires_grad_()
    weight = torch.zeros(layer.C_out, layer.C_in, layer.K, requires_grad=True)
    gamma, beta = (torch.zeros(layer.C_in, requires_grad=True) for _ in range(2))
    stats = None if statistics else (torch.zeros(layer.C_in), torch.ones(layer.C_in))
    conv = counts.Conv("", N, layer.C_in, layer.C_out, layer.K, T, layer.frames(T))
    more = {"padding": layer.padding, "dilation": layer.dilation, "backend": "triton", "next_stats": not statistics}
    out = ops.sub_block(y, gamma, beta, None, None, weight, lengths=torch.full((N,), T), stats=stats, p=0.2, **more)
    out = out if statistics else out[0]
    count = lambda mode: counts.sub_block_bytes(conv, 4, mode, statistics=statistics)  # noqa: E731
    assert count("forward") == 4 * moved(launches)
    out.backward(torch.zeros_like(out))
    assert "stats" not in {name for name, _ in launches}
    # each merge writes one gradient of the weight; the shares that it reads do not count
    merges = sum(name == "conv1d_wgrad_merge" for name, _ in launches)
    assert count("backward") == 4 * (moved(launches) + merges * weight.numel())
    assert count("both") == count("forward") + count("backward")
    if layer.C_in == layer.C_out and not statistics:  # kernels/README.md: 4s and 11s, without weights
        assert count("forward") - 4 * weight.numel() == 4 * 4 * y.numel()
        assert count("backward") - 4 * 2 * weight.numel() == 11 * 4 * y.numel()


def pytorchs_flops(call: Callable[[], torch.Tensor]) -> dict[str, int]:
    """Returns the FLOPs of `call`, of its backward and of both, by PyTorch's counter."""
    with FlopCounterMode(display=False) as forward:
        out = call()
    with FlopCounterMode(display=False) as backward:
        out.backward(torch.empty_like(out))
    found = {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}
    return found | {"both": sum(found.values())}


def conv_flops(layer) -> dict[str, int]:
    x = torch.empty(N, layer.C_in, T, device="meta", requires_grad=not layer.first)
    weight = torch.empty(layer.C_out, layer.C_in, layer.K, device="meta", requires_grad=True)
    return pytorchs_flops(lambda: F.conv1d(x, weight, None, layer.stride, layer.padding, layer.dilation))


@pytest.mark.parametrize("op", ["conv1d", "sub_block"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda a: f"{a.C_in}-{a.C_out}-{a.K}-{a.stride}")
def test_flops_of_conv_cases_are_pytorchs(op, layer, tmp_path):
    """The FLOPs of a case are those of its conv. Those of the norm, less than half a per cent, are not counted."""
    run, expected = make_run(tmp_path), conv_flops(layer)
    assert {mode: sub_blocks.case(run, op, N, T, layer, mode).flops for mode in expected} == expected


@pytest.mark.parametrize("layer", LAYERS, ids=lambda a: f"{a.C_in}-{a.C_out}-{a.K}-{a.stride}")
def test_counts_of_sub_blocks_in_inference(layer, launches, tmp_path):
    """A sub-block in inference is one kernel, whose bytes and FLOPs are those of the conv and its bias."""
    case = sub_block_inference.case(make_run(tmp_path, backend="triton"), N, T, layer)
    runner = case.contenders[0].build()
    launches.clear()  # drops the launch that packed the weight
    runner.run()
    assert [name for name, _ in launches] == ["conv1d_fused"]
    assert case.nbytes == 4 * (moved(launches) + layer.C_out)
    assert case.flops == conv_flops(layer)["forward"] + N * layer.C_out * layer.frames(T)


# ------------------------------------------------------------------ panes


@pytest.mark.parametrize("block", panes.blocks(), ids=lambda b: str(len(b.widths)))
def test_flops_of_panes_are_pytorchs(block, tmp_path):
    """The FLOPs of panes are those of one conv per pane. The additional products of the Gram form do not count."""
    meta = lambda *shape: torch.empty(shape, device="meta", requires_grad=True)  # noqa: E731
    vectors = lambda: [meta(block.C_out) for _ in block.widths]  # noqa: E731
    xs = [meta(N, C, T) for C in block.widths]
    a = panes.Leaves(xs, [meta(block.C_out, C, 1) for C in block.widths], vectors(), vectors())
    running = [(meta(block.C_out).detach(), meta(block.C_out).detach()) for _ in block.widths]
    lengths, run = torch.empty(N, device="meta"), make_run(tmp_path)
    expected = pytorchs_flops(lambda: panes.eager(a, lengths, running, ()))
    assert {mode: panes.case(run, N, T, block, mode).flops for mode in expected} == expected


class Products(TorchDispatchMode):
    """Collects the operands and results of matrix products over all rows.

    A tensor that is used again counts once among the products for weight gradients, and once among all others.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.seen = rows, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            if self.rows in (*a.shape, *b.shape):
                direction = "wgrad" if a.shape[1] == self.rows else "rows"
                tensors = {t.untyped_storage().data_ptr(): t for t in (a, b, out)}
                self.seen.setdefault(direction, {}).update(tensors)
        return out

    def moved(self) -> int:
        """Returns the number of elements collected so far, and clears the collection."""
        total = sum(t.numel() for tensors in self.seen.values() for t in tensors.values())
        self.seen = {}
        return total


@pytest.mark.parametrize("block", [panes.Block((16, 24, 12), 20), panes.Block((24,), 16)], ids=["3", "1"])
def test_bytes_of_panes_are_what_their_products_read_and_write(block, tmp_path):
    run = make_run(tmp_path)
    i = panes.Inputs(N, T, block, torch.float32, CPU)
    xs = i.xs("ntc")
    grams = panes.older_grams([*xs, xs[-1]])  # `older_grams` leaves out the last one
    count = lambda mode: panes.case(run, N, T, block, mode).nbytes  # noqa: E731
    # calls the functions inside the ops, because a dispatch mode cannot look inside an op
    with torch.no_grad(), Products(N * T) as products:
        means = [g.mean for g in grams]
        variances = [gram.statistics(g.mean, g.cov, [w])[1] for g, w in zip(grams, i.weights, strict=True)]
        gram.forward(xs, means, variances, i.weights, i.gammas, i.betas, common.EPS)
        assert count("forward") == 4 * products.moved()
        gram.backward(i.ntc["dy"], xs, means, variances, i.weights, i.gammas, common.EPS, False)
        assert count("backward") == 4 * products.moved()
    assert count("both") == count("forward") + count("backward")


# ------------------------------------------------------------------ arithmetic of bn_relu_dropout


class Arithmetic(TorchDispatchMode):
    """Counts the arithmetic operations per element on tensors of one shape. A sum counts as one per element."""

    COUNTED = ("add", "sub", "mul", "relu", "sum")

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(isinstance(a, torch.Tensor) and a.shape == self.shape for a in args):
            assert name in (*self.COUNTED, "where"), name  # selecting is not arithmetic
            self.count += name in self.COUNTED
        return func(*args, **(kwargs or {}))


def test_flops_of_bn_relu_dropout_are_those_of_its_formula():
    """The formulas of kernels/README.md give autograd's gradients, and bench counts the operations of these
    formulas."""
    inputs = bn_relu_dropout.Inputs(2, 8, 40, torch.float64, CPU, False)
    y, dz = (inputs.nct[n].detach() for n in ("y", "dz"))
    gamma, beta = (t.detach().double()[:, None] for t in (inputs.gamma, inputs.beta))
    p, M = 0.2, y.shape[0] * y.shape[2]
    keep = torch.rand(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) >= p
    keep &= (torch.arange(y.shape[2]) < inputs.lengths[:, None]).unsqueeze(1)
    scale, zero = 1 / (1 - p), torch.zeros((), dtype=torch.float64)

    with Arithmetic(y.shape) as forward:
        mean = y.sum((0, 2), keepdim=True)[0] / M
        centred = y - mean
        m2 = (centred * centred).sum((0, 2), keepdim=True)[0]
        rstd = (m2 / M + common.EPS).rsqrt()
        pre = (y - mean) * (gamma * rstd) + beta
        z = torch.where(keep, pre.relu() * scale, zero)
    open_ = keep & (pre > 0)
    with Arithmetic(y.shape) as backward:
        g = torch.where(open_, dz * scale, zero)
        yhat = (y - mean) * rstd
        dbeta, dgamma = g.sum((0, 2), keepdim=True)[0], (g * yhat).sum((0, 2), keepdim=True)[0]
        g = torch.where(open_, dz * scale, zero)
        yhat = (y - mean) * rstd
        dy = (g - dbeta / M - yhat * (dgamma / M)) * (gamma * rstd)
    want = bn_relu_dropout.answer(inputs, torch.float64, keep, p)
    for name, tensor in {"z": z, "dy": dy, "dgamma": dgamma.flatten(), "dbeta": dbeta.flatten()}.items():
        torch.testing.assert_close(tensor, want[name].double(), msg=name)

    made = {"forward": forward.count, "backward": backward.count, "both": forward.count + backward.count}
    assert {mode: counts.bn_relu_dropout_flops(*y.shape, mode) / y.numel() for mode in made} == made
