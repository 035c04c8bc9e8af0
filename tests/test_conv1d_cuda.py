"""The CUDA C++ face of conv1d, run on the CPU with its PTX instructions emulated (tests/cuda_host.py)."""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import conv_cases
import cuda_host
import pytest
import torch
from close import assert_close
from standins import CPU
from torch import Tensor

from jasper_fast.kernels.conv1d import aten_impl, cuda_impl, cuda_launch, cuda_tiles, reference
from jasper_fast.kernels.conv1d.gpu_shared import Chain
from jasper_fast.kernels.layout import mask, ntc
from jasper_fast.kernels.operands import Lengths, Mask, Norm

SHARED = {75: 65536, 80: 166912, 90: 232448}
LOOPS = [(75, torch.float16), (80, torch.float16), (80, torch.bfloat16), (90, torch.float16), (90, torch.bfloat16)]


def emulation() -> ctypes.CDLL:
    library = ctypes.CDLL(str(cuda_host.build([cuda_host.CSRC / "cuda/emulate/conv1d.cpp"])))
    library.jf_emulation_count.restype = ctypes.c_int64
    return library


@pytest.fixture(scope="module")
def functions() -> ctypes.CDLL:
    return cuda_launch.bind(emulation())


def emulate(patch: pytest.MonkeyPatch, functions: ctypes.CDLL, loop: int, sms: int = 3) -> None:
    """Makes the CUDA face launch `functions`, as on a GPU with the main loop `loop` and `sms` multiprocessors."""
    patch.setattr(cuda_launch, "functions", lambda: functions)
    patch.setattr(cuda_launch, "gpu", lambda device: cuda_tiles.Gpu(loop, sms, SHARED[loop]))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, functions: ctypes.CDLL) -> Callable[..., None]:
    """Returns `emulate` without its first two arguments."""
    return functools.partial(emulate, monkeypatch, functions)


def poisoned(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Returns `x` (N, C, T) in NTC memory with NaN in its padding, which no kernel may read."""
    return ntc(mask(x, lengths, float("nan")))


def check_forward(layer: conv_cases.Layer, dtype: torch.dtype) -> None:
    x, weight, geometry, lengths = conv_cases.make(layer, dtype, CPU)
    got = cuda_impl.forward_stats(poisoned(x, lengths), weight, geometry, lengths)
    ref = reference.forward_stats(x.double(), weight.double(), geometry, lengths)
    low = aten_impl.forward(x, weight, geometry)
    lows = low, *reference.bn.stats(low.float())
    for kind, *three in zip(("y", "mean", "m2"), got, lows, ref, strict=True):
        assert_close(kind, *three)
    assert torch.equal(got[0], cuda_impl.forward(poisoned(x, lengths), weight, geometry, lengths))


def check_gradient_of_x(layer: conv_cases.Layer, dtype: torch.dtype) -> None:
    """Checks dgrad, and dgrad fused with the reduction of batch norm's backward."""
    x, weight, geometry, lengths = conv_cases.make(layer, dtype, CPU)
    n, c, t = x.shape
    dy = ntc(torch.randn(n, weight.shape[0], geometry.frames(t, weight.shape[2])).to(dtype))
    got = cuda_impl.dgrad(dy, weight, t, geometry, lengths)
    low = ntc(mask(aten_impl.dgrad(dy, weight, t, geometry), lengths))
    assert_close("dx", got, low, reference.dgrad(dy.double(), weight.double(), t, geometry, lengths))

    norm = Norm(torch.randn(c), torch.rand(c) + 0.5, torch.rand(c) + 0.5, torch.randn(c))
    y, zeroed = ntc(torch.randn(n, c, t).to(dtype)), Mask(lengths, torch.tensor([5]), 0.2)
    z = reference.bn.forward(y, norm, None, zeroed)
    results = cuda_impl.dgrad_bn(dy, weight, geometry, y, z, norm, zeroed)
    wide = [v.double() for v in (*norm, y, z)]
    ref = reference.dgrad_bn(dy.double(), weight.double(), geometry, *wide[4:], Norm(*wide[:4]), zeroed)
    lows = reference.dgrad_bn(dy, weight, geometry, y, z, norm, zeroed)
    for kind, *three in zip(("g", "dbeta", "dgamma"), results, lows, ref, strict=True):
        assert_close(kind, *three)
    assert all(map(torch.equal, results, cuda_impl.dgrad_bn(dy, weight, geometry, y, z, norm, zeroed)))


def check_gradient_of_the_weight(layer: conv_cases.Layer, dtype: torch.dtype) -> None:
    x, weight, geometry, lengths = conv_cases.make(layer, dtype, CPU)
    k = weight.shape[2]
    dy = ntc(torch.randn(x.shape[0], weight.shape[0], geometry.frames(x.shape[2], k)).to(dtype))
    got = cuda_impl.wgrad(poisoned(x, lengths), dy, k, geometry, lengths, torch.float32)
    ref = reference.wgrad(x.double(), dy.double(), k, geometry, lengths)
    assert_close("dw", got, aten_impl.wgrad(x, dy, k, geometry, dtype=torch.float32), ref)
    assert torch.equal(got, cuda_impl.wgrad(poisoned(x, lengths), dy, k, geometry, lengths, torch.float32))
    assert torch.equal(got.to(dtype), cuda_impl.wgrad(poisoned(x, lengths), dy, k, geometry, lengths))


DIRECTIONS = {"forward": check_forward, "x": check_gradient_of_x, "weight": check_gradient_of_the_weight}


@pytest.mark.parametrize(("loop", "dtype"), LOOPS, ids=str)
@pytest.mark.parametrize("name", conv_cases.LAYERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layers(gpu: Callable, direction: str, name: str, loop: int, dtype: torch.dtype) -> None:
    layer = conv_cases.LAYERS[name]
    if direction == "x" and layer[5] != 1:
        pytest.skip("the gradient of x at a stride is ATen's")
    gpu(loop)
    DIRECTIONS[direction](layer, dtype)


FUSED = {
    # layer, channels of the panes, is the reduction split?, is x fp32 features?, is there a log-softmax?
    "features": ("prologue", 0, False, True, False),
    "last of a block": ("k11", 88, False, False, False),
    "shared": ("k25", 64, True, False, False),
    "shared, dilated": ("dilated", 0, True, False, False),
    "pane alone": ("pane", 40, True, False, False),
    "decoder": ("decoder", 0, True, False, True),
}


@pytest.mark.parametrize(("loop", "dtype"), LOOPS, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_inference(gpu: Callable, name: str, loop: int, dtype: torch.dtype) -> None:
    layer, c2, split, features, log_softmax = FUSED[name]
    gpu(loop, 64 if split else 2)
    check_inference(conv_cases.LAYERS[layer], c2, split, features, log_softmax, dtype)


def check_inference(
    layer: conv_cases.Layer, c2: int, split: bool, features: bool, log_softmax: bool, dtype: torch.dtype
) -> None:
    x, weight, geometry, lengths = conv_cases.make(layer, dtype, CPU)
    k, c_out = weight.shape[2], weight.shape[0]
    lengths = torch.full((x.shape[0],), x.shape[2]) if lengths is None else lengths
    after = geometry.frames(lengths, k).clamp_(0)
    bias, relu = torch.randn(c_out) * 0.3, not log_softmax
    x2 = ntc(mask(torch.randn(x.shape[0], c2, geometry.frames(x.shape[2], k)).to(dtype), lengths)) if c2 else None
    weight2 = (torch.randn(c_out, c2, 1) / c2**0.5).to(dtype) if c2 else None

    def rows(x: Tensor) -> Tensor:
        return poisoned(x, lengths).transpose(1, 2)

    given, masks = rows(x), Lengths(lengths, after)
    if features:  # (N, C, T) in fp32; the kernel writes the output lengths
        given = rows(x.float()).transpose(1, 2).contiguous().transpose(1, 2)
        masks = Lengths(lengths, made=torch.empty_like(lengths))
    panes = None if x2 is None else (rows(x2), cuda_impl.pack_once(weight2, dtype))
    space = cuda_impl.Workspace("cpu") if split else None
    if split:
        space.reserve(1 << 22, 64)
        space.part.fill_(float("nan"))  # NaN shows a partial sum that is read too early
    history = torch.full((x.shape[0], geometry.frames(x.shape[2], k), c_out + 16), float("nan"), dtype=dtype)
    out = None if log_softmax else history[:, :, 8 : 8 + c_out]  # a slice of a wider buffer

    def run() -> Tensor:
        return cuda_impl.fused(
            given, cuda_impl.pack_once(weight, dtype), geometry, lengths=masks, bias=bias, relu=relu, panes=panes,
            out=out, log_softmax=log_softmax, workspace=space,
        ).clone()  # fmt: skip

    got = run()
    wide_panes = None if x2 is None else (x2.double().transpose(1, 2), weight2.double())
    inputs = x.double().transpose(1, 2), weight.double(), geometry
    z = reference.fused(*inputs, lengths=Lengths(lengths), bias=bias.double(), relu=relu, panes=wide_panes)
    low = aten_impl.forward(x, weight, geometry).transpose(1, 2)
    low = low if x2 is None else low + torch.nn.functional.linear(x2.transpose(1, 2), weight2[:, :, 0])
    low = low + bias.to(dtype)

    def finish(z: Tensor) -> Tensor:
        z = z.relu() if relu else z.log_softmax(2)
        return mask(z.transpose(1, 2), after).transpose(1, 2)

    assert_close("z", got, finish(low.float() if log_softmax else low), finish(z))
    assert torch.equal(got, run())
    if masks.made is not None:
        assert torch.equal(masks.made, after)
    if out is not None:
        assert history[:, :, :8].isnan().all() and history[:, :, 8 + c_out :].isnan().all()
    if space is not None:
        assert not space.arrived.any(), "a counter was not set back for the next launch"


# These layers are run with every tile size of every loop, as far as they fit. In loop 90 a CTA gets several tiles.
# Except in the last layer, a tile has more than twice as many steps as there are stages.
WIDE = [
    (2, 72, 136, 150, 11, 1, 1, [150, 61]),
    (1, 136, 200, 233, 9, 1, 1, [233]),
    (2, 200, 72, 131, 9, 1, 2, [30, 131]),
    (3, 72, 200, 141, 11, 2, 1, [141, 1, 0]),
    (1, 64, 72, 230, 3, 1, 100, [230]),  # its panels have too many rows for three stages of wgrad in loop 90
]
TILES = [(loop, block) for loop, blocks in cuda_tiles.BLOCKS.items() for block in blocks]


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "block"), TILES, ids=str)
@pytest.mark.parametrize("layer", WIDE, ids=str)
def test_every_tile(
    gpu: Callable, monkeypatch: pytest.MonkeyPatch, layer: conv_cases.Layer, loop: int, block: int
) -> None:
    monkeypatch.setattr(cuda_tiles, "BLOCKS", {loop: (block,)})
    monkeypatch.setattr(cuda_tiles, "plan", cuda_tiles.plan.__wrapped__)
    gpu(loop, 2)
    for direction, check in DIRECTIONS.items():
        fits = loop != 75 or layer[5:7] in ((1, 1), (1, 2))  # the other layers do not fit into Turing's shared memory
        if fits and (direction != "x" or layer[5] == 1):
            check(layer, torch.float16)


@pytest.mark.parametrize(
    ("capability", "products"), [((8, 0), 1024), ((8, 6), 512), ((8, 9), 512), ((12, 0), 512), ((9, 0), 2048)]
)
def test_plans_know_the_rate_of_the_gpu(monkeypatch: pytest.MonkeyPatch, capability, products: int) -> None:
    properties = SimpleNamespace(
        major=capability[0], minor=capability[1], multi_processor_count=60, shared_memory_per_block_optin=101376,
        L2_cache_size=48 << 20,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = cuda_launch.gpu.__wrapped__(torch.device("cuda", 0))
    assert gpu.products == products and gpu.l2 == 48 << 20
    work = cuda_tiles.Work(1, 100, 256, 256, 0, 11, 1, 1)
    assert cuda_tiles.clocks_of_step(gpu, 64, work)[0] == 128 * 64 * 64 / products


# ---- launches that may begin while the previous launch still runs ----

# Such a launch touches only weights before it waits for the end of the previous launch. The emulation begins it with
# NaN in all memory that the previous launch may read or write. The memory is restored, and the wait ends, only when
# no thread can go on otherwise (csrc/cuda/emulate/grids.cpp).
CHAINED = {
    # layer, channels of the panes, whether several CTAs share a tile
    "a tile in the padding": ((2, 72, 40, 150, 3, 1, 1, [150, 30]), 0, False),
    "panes": ((2, 136, 72, 75, 5, 1, 1, [75, 20]), 88, False),
    "shared": ((1, 264, 72, 75, 5, 1, 2, [61]), 88, True),
    "shared, in the padding": ((2, 264, 40, 140, 3, 1, 1, [140, 0]), 0, True),
    "strided": ((2, 64, 32, 45, 11, 2, 1, [45, 20]), 0, False),
}


@contextlib.contextmanager
def untouched(library: ctypes.CDLL, *tensors: Tensor) -> Iterator[None]:
    """While this context is open, an early launch finds NaN in the memory of `tensors` until it waits."""
    try:
        for x in tensors:
            storage = x.untyped_storage()
            library.jf_emulation_depends(ctypes.c_void_p(storage.data_ptr()), ctypes.c_int64(storage.nbytes()))
        yield
    finally:
        library.jf_emulation_depends(None, ctypes.c_int64(0))  # clears the list


def check_early(library: ctypes.CDLL, layer: conv_cases.Layer, c2: int, shared: bool, dtype: torch.dtype) -> None:
    """Checks that an early launch of `fused` gives the same bits as one that begins only after all earlier
    launches have ended."""
    x, weight, geometry, lengths = conv_cases.make(layer, dtype, CPU)
    n, c_out, k = x.shape[0], weight.shape[0], weight.shape[2]
    rows, bias = poisoned(x, lengths).transpose(1, 2), torch.randn(c_out)
    t_out = geometry.frames(x.shape[2], k)
    packed, space = cuda_impl.pack_once(weight, dtype), cuda_impl.Workspace("cpu") if shared else None
    panes = (torch.randn(n, t_out, c2).to(dtype), cuda_impl.pack_once(torch.randn(c_out, c2, 1), dtype)) if c2 else None
    if shared:
        space.reserve(1 << 20, 64)
    made, out = torch.empty_like(lengths), torch.zeros(n, t_out, c_out, dtype=dtype)

    def run(chain: Chain) -> tuple[Tensor, Tensor]:
        cuda_impl.fused(
            rows, packed, geometry, lengths=Lengths(lengths, None, made), bias=bias, relu=True, panes=panes, out=out,
            workspace=space, chain=chain,
        )  # fmt: skip
        return out.clone(), made.clone()

    want = run(Chain())
    scratch = (space.part, space.arrived) if shared else ()
    with untouched(library, rows, lengths, made, out, *scratch, *(panes or ())[:1]):
        got = run(Chain(True, (packed.data, packed.data)))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("loop", [80, 90])
@pytest.mark.parametrize("name", CHAINED)
def test_an_early_launch_touches_weights_alone_before_it_waits(gpu: Callable, name: str, loop: int) -> None:
    layer, c2, shared = CHAINED[name]
    gpu(loop, 64 if shared else 2)
    library = emulation()
    check_early(library, layer, c2, shared, torch.float16)
    packed = torch.empty(cuda_impl.packed_shape(torch.empty(layer[2], layer[1], layer[4]))[:3])
    assert library.jf_emulation_count(b"prefetch_bulk") == 2 * packed.numel(), "an image was not fetched exactly once"
