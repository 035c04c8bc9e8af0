"""The plan of the self-check has every kernel and configuration that dispatch can choose, once."""

import dataclasses

import pytest
import torch
from conftest import ROOT, make_face
from standins import CONV, CPU, GPU, GPU_NAME, imaginary_gpus_table, verdicts_of_its_own  # noqa: F401

from jasper_fast import JasperConfig
from jasper_fast.dispatch import backends, verdict
from jasper_fast.kernels import tables
from jasper_fast.kernels.conv1d import cuda_launch, cuda_tiles, triton_tiles
from jasper_fast.nn.cells import convs
from jasper_fast.selfcheck import cases, checks


@pytest.mark.parametrize("face", ["cpu", "triton"])
def test_the_plan_holds_every_function_of_every_face_once(face):
    device = make_face(face).device
    plan = checks.plan(device, faces=(face,))
    assert len({check.id for check in plan}) == len(plan)
    functions = {(check.op, check.function) for check in plan}
    convs = checks.CONV if face == "triton" else ("forward", "dgrad", "wgrad")
    assert functions == {
        *(("bn_relu_dropout", f) for f in ("stats", "forward", "backward")),
        *(("conv1d", f) for f in convs), ("conv1d.fused", "fused"), *([("panes", "plain")] if face == "cpu" else []),
        ("novograd", "step"), *([("ctc", "loss")] if face == "triton" else []),
        *(("depthwise", f) for f in checks.DEPTHWISE),
    }  # fmt: skip
    others = {"pack", "pack_once", "packed_shape", "packed_size", "takes_tf32", "has_bf16", "into"}
    for op in ("bn_relu_dropout", "conv1d", "depthwise"):  # the plan has every public function of the face
        module = backends.face(op, face)
        names = {"backward" if name.startswith("backward") else name for name, thing in vars(module).items()
                 if not name.startswith("_") and callable(thing) and not isinstance(thing, type)
                 and getattr(thing, "__module__", "") == module.__name__}  # fmt: skip
        assert names - others <= {f for _, f in functions}
    quick = checks.plan(device, faces=(face,), quick=True)
    if face == "triton":  # a quick check is in bf16, in which there is no optimiser step and no loss
        functions -= {("novograd", "step"), ("ctc", "loss")}
    assert {(c.op, c.function) for c in quick} == functions and len(quick) < len(plan) / 2


def test_the_plan_leaves_out_what_was_not_asked_for():
    plan = checks.plan(CPU, ops=("conv1d",), faces=(make_face("cpu").name,))
    assert {(check.op, check.face) for check in plan} == {("conv1d", "cpu")}
    for name in ("op", "face", "dtype"):
        with pytest.raises(ValueError, match=f"{name} 'conv2d' is not one of"):
            checks.plan(CPU, **{f"{name}s": ("conv2d",)})


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Pretends that there is an sm_90 that runs all faces for GPUs and has no table."""
    monkeypatch.setenv("JASPER_FAST_TABLES", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU_NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cuda_launch, "gpu", lambda device: cuda_tiles.Gpu(90, 132, 232448))
    monkeypatch.setattr(backends, "why_missing", lambda face, device: "a CPU's" if face == "cpu" else None)


@pytest.mark.parametrize("quick", [True, False])
def test_every_check_is_made_in_the_dtype_that_is_asked_for(gpu, quick):
    plans = {dtype: checks.plan(GPU, quick=quick, dtypes=(dtype,)) for dtype in checks.DTYPES}
    assert all({check.dtype for check in plan} == {dtype} for dtype, plan in plans.items())
    # These checks exist in fp32 only: exact products, the optimiser's step and the loss.
    exact = {check.id for check in plans["float32"] if checks.EXACT in check.variant or check.op in ("novograd", "ctc")}
    same = [
        {check.id.replace(f"| {dtype} |", "|") for check in plan if check.id not in exact}
        for dtype, plan in plans.items()
    ]
    sixteen = {check for check in same[1] if not check.startswith(("conv1d | cuda |", "conv1d.fused | cuda |"))}
    assert exact and same[1] == same[2] and same[0] == sixteen  # the CUDA convs exist in 16 bits only
    both = {(op, face) for op in ("conv1d", "conv1d.fused", "bn_relu_dropout") for face in ("triton", "cuda")}
    assert {(c.op, c.face) for c in plans["float16"]} == both | {("panes", "aten"), ("depthwise", "triton")}
    assert not any(c.face == "cuda" and c.op in ("conv1d", "conv1d.fused") for c in plans["float32"])
    by_default = [plans["bfloat16"]] if quick else plans.values()
    assert {check.id for check in checks.plan(GPU, quick=quick)} == {check.id for plan in by_default for check in plan}


def test_a_face_is_checked_in_the_dtypes_that_it_has():
    """The CPU face is checked in all three dtypes; its panes and its optimiser's step are checked in fp32 only."""
    make_face("cpu")
    plan = checks.plan(CPU, faces=("cpu",))
    in_each = {dtype: {check.op for check in plan if check.dtype == dtype} for dtype in checks.DTYPES}
    assert in_each["float32"] == set(verdict.OPS) - {"ctc"}
    assert in_each["float16"] == in_each["bfloat16"] == set(verdict.OPS) - {"panes", "novograd", "ctc"}
    assert {check.dtype for check in checks.plan(CPU, faces=("cpu",), dtypes=("float16",))} == {"float16"}
    assert {check.dtype for check in checks.plan(CPU, quick=True)} <= {"float32", "bfloat16"}


@pytest.mark.parametrize("quick", [True, False])
def test_every_conv_is_checked_once_where_it_fills_the_gpu(gpu, quick):
    waves = [check for check in checks.plan(GPU, quick=quick, dtypes=("bfloat16",)) if check.variant == checks.WAVE]
    for face in ("triton", "cuda"):
        assert [check.function for check in waves if check.face == face] == [*checks.CONV, "fused"]
    waves = [check for check in waves if check.face == "triton"]
    for check in waves:
        s = check.shape
        assert (s.n, s.t_out) == (32, 840) and s.c_in == s.c_out == 256
        shape = triton_tiles.Shape(s.c_in, s.c_out, s.k, s.stride, s.dilation, s.n * s.t_out)
        tile = triton_tiles.default(check.function, torch.bfloat16, shape, s.t_out)
        if check.function == "wgrad":
            programs = s.k * -(-s.c_in // tile.n) * -(-s.c_out // tile.k) * tile.splits
        else:
            programs = s.n * -(-s.t_out // tile.t) * -(-s.c_out // tile.n)
        assert programs > 1.5 * 132, "an H100 has 132 SMs"
    lengths = cases._Draw(CPU, torch.float32, 1, timed=False, busy=True).lengths(32, 840)
    assert lengths[0] == 840 and lengths.min() >= 420, "every program has frames to compute"
    assert cases.case(dataclasses.replace(waves[0], face="triton", shape=CONV), CPU, 1).inputs["lengths"].min() > 0


@pytest.mark.parametrize("quick", [True, False])
def test_convs_that_are_not_told_of_zeros_are_checked_on_small_shapes(gpu, quick):
    plan = checks.plan(GPU, quick=quick, dtypes=("bfloat16",), ops=("conv1d", "conv1d.fused"))
    unclean = [check for check in plan if checks.UNCLEAN in check.variant]
    assert {(c.function, c.shape) for c in unclean if c.op == "conv1d"} == {
        (f, s) for f in ("forward", "forward_stats", "wgrad") for s in checks.SMALL_CONV if not quick
    }
    assert {c.variant for c in unclean if c.op != "conv1d"} == (
        set() if quick else {"plain unclean", "panes unclean"}
    )  # fmt: skip
    for check in {(c.function, c.variant): c for c in unclean}.values():
        assert cases.case(check, make_face("triton").device, 1).inputs["given"].isnan().any()


def test_the_plan_of_a_gpu_holds_every_tile_of_its_table(gpu, put_table, monkeypatch):
    tiles = [{"t": t, "n": 64, "k": 32, "num_warps": 4, "num_stages": 3, "splits": s} for t, s in
             ((16, 1), (32, 1), (64, 1), (128, 4))]  # fmt: skip
    same = {"dtype": "bfloat16", "c_in": 256, "c_out": 384, "taps": 13, "stride": 1, "dilation": 1, "time_s": 1.0}
    ours = {"face": "triton", "algorithm": "direct"}
    put_table([
        *(tables.Row(op="conv1d.forward", rows_log2=b, tile=t, **same, **ours) for b, t in zip((8, 12, 15), tiles[:3])),
        tables.Row(op="conv1d.fused", rows_log2=7, tile=tiles[3], **same, **ours),
        tables.Row(op="conv1d.forward", rows_log2=8, tile=None, face="aten", algorithm="library", **same),
    ])  # fmt: skip

    plan = checks.plan(GPU)
    measured = [check for check in plan if check.tile]
    assert [check.tile for check in measured] == [*tiles, tiles[3]]
    assert [check.variant for check in measured] == ["", "", "", "splits", "panes splits"]
    assert all((c.shape.c_in, c.shape.c_out, c.shape.k) == (256, 384, 13) for c in measured)
    assert len({check.id for check in plan}) == len(plan)
    assert {check.face for check in plan} == {"triton", "cuda", "aten"}
    real = {(c.shape.c_in, c.shape.c_out) for c in plan if c.op == "conv1d" and not c.tile}
    assert {(768, 768), (896, 1024), (1024, 29), (64, 256)} <= real

    # A quick plan has up to three tiles of each op.
    assert [check.tile for check in checks.plan(GPU, quick=True) if check.tile] == tiles
    monkeypatch.setattr(checks, "QUICK_TILES", 1)
    assert len([check.tile for check in checks.plan(GPU, quick=True) if check.tile]) == 2


def test_real_shapes_are_those_of_the_model():
    config = JasperConfig.from_yaml(ROOT / "configs" / "jasper10x5dr.yaml")
    wanted = {conv.shape for conv in convs(config) if conv.place != "decoder"}
    have = {(c.c_in, c.c_out, c.k, c.stride, c.dilation) for c in checks.REAL_CONV}
    assert (64, 256, 11, 2, 1) in wanted and (768, 896, 29, 1, 2) in wanted
    assert len(have & wanted) >= 9 and have - wanted == {(1024, 29, 1, 1, 1)}, "only the decoder is not in the encoder"


@pytest.mark.parametrize("quick", [True, False])
def test_every_conv_is_checked_with_exact_products_too(gpu, quick):
    plan = [check for check in checks.plan(GPU, quick=quick) if checks.EXACT in check.variant.split()]
    assert {check.dtype for check in plan} == (set() if quick else {"float32"})
    plan = checks.plan(GPU, quick=quick, dtypes=("float32",))
    assert {c.function for c in plan if checks.EXACT in c.variant.split()} == {*checks.CONV, "fused"}


@pytest.mark.parametrize("quick", [True, False])
def test_every_face_of_the_norms_that_can_be_chosen_has_its_checks(gpu, quick):
    """The CUDA face of the norms has the same checks as the Triton face."""
    of = {}
    for face in ("triton", "cuda"):
        plan = checks.plan(GPU, quick=quick, ops=("bn_relu_dropout",), faces=(face,))
        assert {check.function for check in plan} == {"stats", "forward", "backward"}
        of[face] = {check.id.replace(f"| {face} |", "|") for check in plan}
    assert of["cuda"] == of["triton"]
