"""Lists the Triton kernels to compile: calls our Triton functions at the shapes of Jasper's and QuartzNet's layers and
records the launches.

The tensors are on the meta device, so nothing is computed.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator

import torch

from jasper_fast.bench.cases.layers import Layer, layers
from jasper_fast.kernels import aot, launch, precision, tables
from jasper_fast.kernels.bn_relu_dropout import triton_impl as bn
from jasper_fast.kernels.conv1d import triton_impl as conv1d, triton_tiles
from jasper_fast.kernels.ctc import triton_impl as ctc
from jasper_fast.kernels.depthwise import triton_impl as depthwise
from jasper_fast.kernels.novograd import triton_impl as novograd
from jasper_fast.kernels.novograd.operands import Settings, Tensors, Watched
from jasper_fast.kernels.operands import Geometry, Lengths, Mask, Norm
from jasper_fast.kernels.prefix_beam import triton_impl as prefix_beam

N = 32  # utterances of a batch
P = 0.2  # dropout rate
FRAMES = (840, 48, 16)  # T' of the longest utterance (16.7 s), and smaller T' for which the default tiles are narrower
LABELS = (120, 250, 500)  # numbers of labels of a target; a batch of speech has up to about 400
PANES = 256  # channels of the history (all earlier block outputs side by side), which the panes read
TAPS_C = 512  # channels of QuartzNet's depthwise convs
# (T', K, stride, masks) of depthwise convs. The two T' give large and small tiles. The numbers of taps K give both
# values of BLOCK_K (64 and 128) of the kernel that adds the partial sums of dw.
TAPS = (
    (840, 87, 1, True), (840, 63, 1, False), (840, 33, 2, True),
    (16, 63, 1, True), (16, 63, 1, False), (16, 33, 2, True),
)  # fmt: skip
META = torch.device("meta")
PARTS = {
    "HAS_STATS": " stats", "HAS_NORM": " bn", "HAS_PANES": " panes", "HAS_SPLITS": " split", "IS_DIRECT": " direct",
}  # fmt: skip

Recorded = Iterator[tuple[str, str, aot.Source]]  # (kernel, layer, source)


def recorded(arch: int, dtype: str) -> Recorded:
    """Yields every launch that dispatch can choose, with default and with measured tiles."""
    number = getattr(torch, dtype)
    wide = sorted(layers(), key=lambda a: (a.head, -a.C_in, -a.C_out, a.K))
    lengths = [(T, True) for T in FRAMES] + [(FRAMES[0], False)]
    for (T, masks), exact, a in itertools.product(lengths, _exacts(number), wide):
        for odd in range(a.stride):  # at stride 2 also an odd T, for which the kernel uses no tensor descriptor
            name = f"{a.C_in}->{a.C_out} T{T}" + " s2" * a.first + " odd T" * odd
            for op, call in conv_calls(a, a.stride * T - odd, number, masks).items():
                for tile in _tiles(op, a, T, number, exact):
                    yield from ((kernel, name, source) for kernel, source in _sources(arch, call, op, tile, exact))
    calls: list[tuple[str, Callable[[], object]]] = [
        (
            f"C{TAPS_C} K{K} T{T}" + f" s{stride}" * (stride > 1),
            functools.partial(taps_calls, K, stride, stride * T, number, masks),
        )
        for T, K, stride, masks in TAPS
    ]
    channels = sorted({a.C_in for a in wide if not a.first}, reverse=True)
    calls += [(f"C{C}", functools.partial(norm_calls, C, number)) for C in channels]
    if dtype == "float32":
        calls += [
            ("all" + " unaligned" * (not aligned), functools.partial(step, aligned, averages))
            for averages, aligned in itertools.product((True, False), repeat=2)
        ]
        calls += [*((f"U{U}", functools.partial(loss, U)) for U in LABELS), ("any", prefixes)]
    for name, call in calls:
        for kernel, source in _sources(arch, call):
            yield kernel, "any" if kernel == "ctc gradient" else name, source
    yield from measured(arch, dtype)


def measured(arch: int, dtype: str) -> Recorded:
    """Yields the launches with the tiles of the tables for GPUs of this architecture."""
    number = getattr(torch, dtype)
    for path in sorted(tables.folder().glob("*.json")):
        table = tables.load(path)
        for row in table.rows if table.header["capability"] == f"sm_{arch}" else ():
            if row.tile is None or row.dtype != dtype:
                continue
            a, op = Layer(row.c_in, row.c_out, row.taps, row.stride, row.dilation), row.op.removeprefix("conv1d.")
            call = conv_calls(a, a.stride * max(1, (1 << row.rows_log2) // N), number, True)[op]
            name = f"{a.C_in}->{a.C_out} {path.stem}" + f" s{a.stride}" * a.first
            for exact, splits in itertools.product(_exacts(number), (1, 2) if op == "fused" else (1,)):
                for kernel, source in _sources(arch, call, op, {**row.tile, "splits": splits}, exact):
                    if "PRECISION" in source.constants:  # the others pack or merge, and do not use the tile
                        yield kernel, name, source


def conv_calls(a: Layer, T: int, dtype: torch.dtype, masks: bool) -> dict[str, Callable[[], object]]:
    """Returns the conv calls of training and inference for a layer at `T` frames, by op."""
    x = torch.empty(N, T, a.C_in, dtype=dtype, device=META).transpose(1, 2)
    weight, channel = torch.empty(a.C_out, a.C_in, a.K, device=META), torch.empty(a.C_in, device=META)
    lengths = torch.empty(N, dtype=torch.int64, device=META)
    how, masked = Geometry(a.stride, a.padding, a.dilation), lengths if masks else None
    fused = {"fused": functools.partial(_fused, a, x, weight, how, lengths, masks)}
    if a.head:  # in training the decoder uses ATen
        return fused
    dy = x.new_empty(N, a.frames(T), a.C_out).transpose(1, 2)
    training = {
        "forward": lambda: conv1d.forward(x, weight, how, masked, clean=True),
        "forward_stats": lambda: conv1d.forward_stats(x, weight, how, masked, clean=True),
        "wgrad": lambda: conv1d.wgrad(x, dy, a.K, how, masked, dtype=weight.dtype, clean=True),
    }
    if not a.first:
        training |= {
            "dgrad": lambda: conv1d.dgrad(dy, weight, T, how, masked),
            "dgrad_bn": lambda: conv1d.dgrad_bn(dy, weight, how, x, x, Norm(*[channel] * 4), Mask(masked, p=P)),
        }
    return fused | training


def _fused(a: Layer, x: torch.Tensor, weight: torch.Tensor, how: Geometry, lengths: torch.Tensor, masks: bool) -> None:
    """Calls the fused conv as the inference engine does for this layer.

    The first layer of the model reads fp32 features, and its last layer ends in log-softmax.
    """
    fused = functools.partial(
        conv1d.fused, packed=conv1d.pack(weight, x.dtype), geometry=how, bias=weight.new_empty(a.C_out),
        relu=not a.head, workspace=conv1d.Workspace(META),
    )  # fmt: skip
    ntc, ends = x.transpose(1, 2), Lengths(lengths, made=lengths, masked=masks and not a.head)
    if a.first:
        fused(torch.empty(x.shape, device=META).transpose(1, 2), lengths=ends)
    elif a.head:
        fused(ntc, lengths=ends, clean=True, log_softmax=True)
    else:
        panes = x.new_empty(*ntc.shape[:2], PANES), conv1d.pack(weight.new_empty(a.C_out, PANES, 1), x.dtype)
        for some in (None, panes):
            fused(ntc, lengths=Lengths(lengths, lengths) if masks else Lengths(), clean=True, panes=some)


def taps_calls(K: int, stride: int, T: int, dtype: torch.dtype, masks: bool) -> None:
    """Calls all functions of the depthwise conv, as training and the engine do."""
    how = Geometry(stride, K // 2)
    x, weight = torch.empty(N, T, TAPS_C, dtype=dtype, device=META), torch.empty(TAPS_C, 1, K, device=META)
    dy, some = x.new_empty(N, how.frames(T, K), TAPS_C), torch.empty(N, dtype=torch.int64, device=META)
    lengths = Lengths(some, some) if masks else Lengths()
    depthwise.forward(x.transpose(1, 2), weight, how, lengths)
    depthwise.dgrad(dy.transpose(1, 2), weight, T, how, lengths)
    depthwise.wgrad(x.transpose(1, 2), dy.transpose(1, 2), K, how, lengths, weight.dtype)
    if stride > 1:  # at this stride the engine also lets the kernel compute the output lengths
        depthwise.into(dy, x, depthwise.pack_once(weight, dtype), how, Lengths(some, made=some, masked=masks))


def norm_calls(C: int, dtype: torch.dtype) -> None:
    """Calls all functions of bn_relu_dropout with `C` channels, with and without each optional argument."""
    y = torch.empty(N, FRAMES[0], C, dtype=dtype, device=META).transpose(1, 2)
    some = torch.empty(N, dtype=torch.int64, device=META)
    norm = Norm(*(torch.empty(C, device=META) for _ in range(4)))
    bn.stats(y)
    for residual, lengths, p in itertools.product((None, y), (None, some), (0.0, P)):
        mask = Mask(lengths, some[:1] if p else None, p)
        bn.forward(y, norm, residual, mask)
        bn.backward_reduce(y, y, residual, norm, mask)
        for means, halo in ((None, None), (norm[:2], None), (norm[:2], 0)):
            bn.backward_apply(y, y, residual, norm, means, mask, residual is not None, halo)


def step(aligned: bool, averages: bool) -> None:
    """Calls NovoGrad's step, with aligned or unaligned tensors, and with or without the moving average."""
    of = [torch.empty(1004, device=META)[0 if aligned else 1 :]]
    settings = torch.empty(1, len(Settings._fields), dtype=torch.float64, device=META)
    novograd.step(
        Tensors(of, of, of, of, of if averages else [], [0]), Watched([], []), settings, None, None, 0.0, True, {}
    )


def loss(labels: int) -> None:
    """Calls the CTC loss for targets with this number of labels, and its gradient."""
    log_probs = torch.empty(N, FRAMES[0], 29, device=META)
    lengths, targets = (torch.empty(*shape, dtype=torch.int64, device=META) for shape in ((N,), (N, labels)))
    given = log_probs, lengths, targets, lengths
    losses, alpha = ctc.forward(*given, 28)
    ctc.backward(losses, *given, losses, alpha, 28, False)


def prefixes() -> None:
    """Calls a prefix search over Jasper's 29 classes."""
    log_probs, lengths = torch.empty(N, FRAMES[0], 29, device=META), torch.empty(N, dtype=torch.int64, device=META)
    prefix_beam.search(log_probs, lengths, prefix_beam.BEAM, 1)


def _exacts(dtype: torch.dtype) -> tuple[bool, ...]:
    """Returns the values of `exact` to compile for.

    fp32 has kernels that round products to TF32 (False) and exact ones (True); PyTorch's setting of the fp32 precision
    chooses at run time. Other dtypes have only False.
    """
    return (False, True) if dtype == torch.float32 else (False,)


def _tiles(op: str, a: Layer, T: int, dtype: torch.dtype, exact: bool) -> Iterator[dict[str, int] | None]:
    """Yields the tiles that dispatch uses for a layer. None stands for the default tile.

    For inference and for the gradient of the weight, each tile is yielded with and without a split of the reduction
    over several programs. Dispatch splits the reduction if a conv has few tiles.
    """
    if op not in ("fused", "wgrad"):
        yield None
        return
    shape = triton_tiles.Shape(a.C_in, a.C_out, a.K, a.stride, a.dilation, N * T)
    default = triton_tiles.default(op, dtype, shape, T, exact)
    for tile in triton_tiles.narrower(default, dtype) if op == "fused" else [default]:
        yield from (tile._replace(splits=splits)._asdict() for splits in (1, 2))


def _sources(
    arch: int, call: Callable[[], object], op: str = "", tile: dict[str, int] | None = None, exact: bool = False
) -> list[tuple[str, aot.Source]]:
    """Records the launches of `call` and returns (kernel name, source to compile for `arch`) for each.

    If `tile` is given, the conv op `op` uses it in place of the tile that dispatch would choose.
    """
    found: list[tuple[str, aot.Source]] = []
    recording = launch.recorded(lambda one: found.append((called(one, exact), aot.source(one, arch))), arch)
    forced = tables.forced(f"conv1d.{op}", tile) if tile else contextlib.nullcontext()
    with precision.fp32("ieee" if exact else "tf32"), recording, forced:
        call()
    return found


def called(one: launch.Launch, exact: bool) -> str:
    """Returns the kernel's name in a row: its function, and the optional parts that are used."""
    values, name = one.arguments, one.name.strip("_").removesuffix("_kernel")
    spaced = name.replace("_", " ")
    if name.startswith("depthwise"):
        spaced = "depthwise dgrad" if values.get("FLIPPED") else spaced.replace("sum", "forward")
        spaced += " makes lengths" * bool(values.get("HAS_LENGTHS_OUT"))
        return spaced + " no masks" * (not values.get("HAS_MASK", values.get("HAS_IN_LENGTHS")))
    if name.startswith(("ctc", "prefix_beam")):
        return spaced
    if not name.startswith("conv1d"):
        flags = (flag.removeprefix("HAS_").lower() for flag in values if flag.startswith("HAS_") and values[flag])
        return " ".join(["novograd" if name in ("squares", "update") else "bn_relu_dropout", name, *flags])
    last = values.get("HAS_LOG_SOFTMAX")
    spaced = "conv1d first" if values.get("IS_NCT") else "conv1d last" if last else spaced
    spaced += "".join(part for flag, part in PARTS.items() if values.get(flag))
    unmasked = not last and not values.get("HAS_MASK", values.get("HAS_LENGTHS", True))
    return spaced + " no masks" * unmasked + " ieee" * (exact and "PRECISION" in values)
