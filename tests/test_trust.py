"""`backend="auto"` chooses by verdicts and tables, and the choice is a constant of a compiled graph."""

import dataclasses
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from standins import (  # noqa: F401
    BF16,
    CPU,
    FP16,
    FP32,
    GPU,
    NORM,
    SHAPE,
    conv_rows,
    imaginary_gpus_table,
    pretend_a_gpu,
    verdict,
    verdicts_of_its_own,
)
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from jasper_fast import ops
from jasper_fast.dispatch import backends, choose, rules, verdicts
from jasper_fast.dispatch.verdict import BAD, GOOD, UNCHECKED
from jasper_fast.kernels import tables
from jasper_fast.nn.block import JasperBlock
from jasper_fast.nn.config import JasperConfig
from jasper_fast.ops.bn_relu_dropout_op import norm_face as norm_face_of

WHY_MISSING = backends.why_missing
IN_TRITON = (GPU, NORM, "triton", BF16)  # the check of the norm in Triton
IN_CUDA = (GPU, NORM, "cuda", BF16)


def silent() -> warnings.catch_warnings:
    """Returns a context in which a warning fails the test."""
    return warnings.catch_warnings(action="error")


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU. `found` sets the verdict that a check gives, by op, (op, face) or (op, face,
    dtype); all other verdicts are good. `checked` lists the checks that were made."""
    made = SimpleNamespace(found={}, checked=[])

    def check(device, op, face, dtype):
        made.checked.append((device, op, face, dtype))
        known = next((made.found[key] for key in ((op, face, dtype), (op, face), op) if key in made.found), None)
        return dataclasses.replace(known or verdict(op, quick=True), face=face, dtype=dtype)

    pretend_a_gpu(monkeypatch, traits=None)
    monkeypatch.setattr(verdicts, "_check_now", check)
    return made


CONVS = ("conv1d", "conv1d.fused")
OURS_FASTER = {"conv1d.forward": (1.0, 2.0), "conv1d.fused": (1.0, 2.0)}

# {(channels, rows_log2): {face: (seconds of forward, of backward)}}
NORMS = {
    (256, 12): {"triton": (1.0, 1.0), "cuda": (1.5, 0.2), "reference": (9.0, 9.0)},
    (256, 15): {"triton": (8.0, 8.0), "cuda": (9.0, 9.0), "reference": (90.0, 90.0)},
    (384, 12): {"triton": (3.0, 3.0), "cuda": (2.0, 2.0), "reference": (1.0, 1.0)},
    (640, 12): {"triton": (2.0,), "cuda": (1.0,)},  # backward was not measured
    (768, 12): {"triton": (1.0, 1.0), "cuda": (0.5, 2.0), "reference": (9.0, 9.0)},
}


@pytest.fixture
def norm_table(put_table):
    algorithm = {"triton": "direct", "cuda": "direct", "reference": "library"}
    put_table([
        tables.Row(op, BF16, *tables.shape_of_norm(channels).values(), rows_log2, face, algorithm[face], None, spent)
        for (channels, rows_log2), of_faces in NORMS.items()
        for face, times in of_faces.items()
        for op, spent in zip(tables.NORM_OPS, times)
    ])  # fmt: skip


def norm_face(channels: int, rows_log2: int | None = 12, dtype=torch.bfloat16, backend: str = "auto") -> str:
    return choose.norm_face(backend, GPU, dtype, channels, rows_log2)


def conv_face(dtype=torch.bfloat16, rows_log2: int | None = 12, backend: str = "auto", **more) -> str:
    return choose.conv_face(backend, GPU, dtype, shape=SHAPE, rows_log2=rows_log2, **more)


def fused_face(dtype=torch.bfloat16, rows_log2: int = 12) -> str:
    """Returns the face that an engine of one conv uses."""
    faces = choose.fused_faces("auto", GPU, dtype)
    return faces[0] if len(faces) == 1 else choose.fused_face(GPU, dtype, ((SHAPE, 1),), rows_log2, faces)


# ---- checks ----


def test_a_kernel_is_checked_on_first_use_and_used_where_it_is_right(gpu):
    assert choose.resolve("auto", GPU, NORM, torch.bfloat16) == "triton"
    assert gpu.checked == [IN_TRITON]
    choose.forget()
    assert choose.resolve("auto", GPU, NORM, torch.bfloat16) == "triton"
    assert len(gpu.checked) == 1, "the verdict was kept"


@pytest.mark.parametrize(("status", "word"), [(BAD, "is WRONG on"), (UNCHECKED, "could not be checked on")])
def test_a_bad_verdict_gives_plain_pytorch_and_one_loud_line(gpu, status, word):
    gpu.found[NORM] = verdict(NORM, status)
    with pytest.warns(RuntimeWarning) as said:
        assert choose.resolve("auto", GPU, NORM, torch.bfloat16) == "reference"
        assert choose.resolve("auto", GPU, NORM, torch.bfloat16) == "reference"
        choose._resolve.cache_clear()
        assert choose.resolve("auto", GPU, NORM, torch.bfloat16) == "reference"
    assert len(said) == 1
    text = str(said[0].message)
    assert f"{NORM} (triton, bfloat16) {word} NVIDIA Imaginary 9000" in text
    assert "dgrad (2, 64->48, 37) wrong: 7 %" in text and "jasper-fast selfcheck" in text


def test_what_is_used_in_a_dtype_was_checked_in_it(gpu, put_table):
    put_table(conv_rows(OURS_FASTER, BF16, FP16, FP32))
    gpu.found |= {(op, "triton", FP16): verdict(op, BAD) for op in (NORM, *CONVS)}
    faces = lambda dtype: (norm_face(256, dtype=dtype), conv_face(dtype), fused_face(dtype))  # noqa: E731
    assert faces(torch.bfloat16) == faces(torch.float32) == ("triton",) * 3
    assert {(op, dtype) for _, op, _, dtype in gpu.checked} == set(itertools.product((NORM, *CONVS), (BF16, FP32)))
    gpu.found["conv1d.fused", "cuda", FP16] = verdict("conv1d.fused", BAD)
    with pytest.warns(RuntimeWarning) as said:
        assert faces(torch.float16) == ("reference", "aten", "aten")
    assert [", float16) is WRONG" in str(w.message) for w in said] == [True] * 4


def test_who_names_no_dtype_asks_for_all(gpu):
    gpu.found[NORM, "triton", BF16] = verdict(NORM, BAD)
    with pytest.warns(RuntimeWarning, match="bfloat16"):
        assert choose.resolve("auto", GPU, NORM) == "reference"
    assert {dtype for *_, dtype in gpu.checked} == {BF16, FP16, FP32}


def test_the_warning_says_what_follows(gpu, norm_table, put_table):
    gpu.found |= {op: verdict(op, BAD) for op in (NORM, *CONVS, "panes")}
    with pytest.warns(RuntimeWarning) as said:
        assert norm_face(256) == "reference"
        put_table(conv_rows(OURS_FASTER, BF16))
        assert (conv_face(), fused_face()) == ("aten", "aten")
        assert choose.pane_form("auto", GPU, torch.bfloat16) == "plain"
    follows = ("tries its Triton kernel next", "uses plain PyTorch for it instead", "uses PyTorch's own conv",
               "uses PyTorch's own conv", "uses PyTorch's own conv", "panes='auto' takes the plain form")  # fmt: skip
    assert [what in str(w.message) for what, w in zip(follows, said, strict=True)] == [True] * 6


@pytest.mark.parametrize("name", ["triton", "cuda", "reference"])
def test_a_backend_asked_for_by_name_is_neither_checked_nor_looked_up(gpu, norm_table, monkeypatch, name):
    monkeypatch.setattr(tables, "fastest", lambda *_, **__: pytest.fail("looked up"))
    gpu.found[NORM] = verdict(NORM, BAD)
    assert choose.resolve(name, GPU, NORM) == norm_face(256, backend=name) == norm_face(768, backend=name) == name
    assert choose.conv_face("triton", GPU, torch.bfloat16) == "triton"
    assert gpu.checked == []


def test_the_cpu_is_neither_checked_nor_looked_up(gpu, norm_table, monkeypatch):
    monkeypatch.setattr(tables, "fastest", lambda *_, **__: pytest.fail("looked up"))
    assert choose.resolve("auto", CPU, NORM) == choose.norm_face("auto", CPU, torch.float32, 256, 12) == "cpu"
    assert choose.conv_face("auto", CPU, torch.float32, shape=SHAPE) == "cpu"
    assert gpu.checked == []


# ---- convs ----


def test_without_a_table_arithmetic_chooses(gpu):
    """Without a table 16-bit convs run in Triton, which skips padding, and fp32 convs in the library, whose fp32 matrix
    products are faster. With few rows fp32 convs run in Triton too, because then memory traffic and launches take most
    of the time."""
    step = choose.conv_calls(stats=True, dx=True, dw=True, norm=True)
    assert conv_face(calls=step, rows_log2=15) == conv_face(calls=step, rows_log2=None) == "triton"
    assert conv_face(torch.float32, calls=step, rows_log2=15) == "aten"
    assert {op for _, op, *_ in gpu.checked} == {"conv1d"}, "what is not used is not checked"
    wide, faces = (((768, 768, 25, 1, 1), 5), ((1024, 29, 1, 1, 1), 1)), ("triton", "aten")
    of = lambda dtype: [choose.fused_face(GPU, dtype, wide, rows_log2, faces) for rows_log2 in (7, 10, 15)]  # noqa: E731
    assert norm_face(256) == norm_face(768, None) == "triton"
    assert of(torch.float16) == ["triton"] * 3 and of(torch.float32) == ["triton", "aten", "aten"]


def test_convs_take_the_face_that_the_table_says(gpu, put_table):
    put_table(conv_rows({"conv1d.forward": (1.0, 2.0), "conv1d.wgrad": (5.0, 1.0)}, BF16))
    assert conv_face() == "triton"
    assert conv_face(rows_log2=None) == "triton", "as under torch.compile"
    assert conv_face(calls=choose.conv_calls(dw=True)) == "aten"
    assert conv_face(torch.float32, rows_log2=15) == "aten", "not measured, so by estimates"
    assert conv_face(torch.float64) == conv_face(strided_dx=True) == "aten"
    assert gpu.checked[0] == (GPU, "conv1d", "triton", BF16)


def test_a_faster_face_that_is_wrong_is_not_taken(gpu, put_table):
    put_table(conv_rows(OURS_FASTER, BF16))
    gpu.found["conv1d"] = verdict("conv1d", BAD)
    with pytest.warns(RuntimeWarning, match=r"conv1d \(triton, bfloat16\) is WRONG") as said:
        assert conv_face() == conv_face(rows_log2=13) == "aten"
    assert len(said) == 1
    with silent():
        assert fused_face() == "triton", "inference has its own verdict"
        assert choose.resolve("auto", GPU, NORM, torch.bfloat16) == "triton"


# ---- norms ----


@pytest.mark.parametrize(
    ("asked", "wanted", "checked"),
    [
        ((256,), "cuda", [IN_CUDA]),  # forward + backward: cuda 1.5 + 0.2 s < triton 1 + 1 s
        ((256, 11), "cuda", [IN_CUDA]),  # the nearest measured number of rows is 2**12
        ((256, 15), "triton", [IN_TRITON]),
        ((256, 16), "triton", [IN_TRITON]),
        ((256, None), "triton", [IN_TRITON]),  # the largest measured number of rows is 2**15
        ((384,), "reference", []),
        ((512,), "triton", [IN_TRITON]),  # not measured
        ((640,), "triton", [IN_TRITON]),  # its backward was not measured
        ((768,), "triton", [IN_TRITON]),  # forward + backward: cuda 0.5 + 2 s > triton 1 + 1 s
        ((256, 12, torch.float16), "triton", [(GPU, NORM, "triton", FP16)]),  # not measured
        ((256, 12, torch.float64), "reference", []),  # no kernel takes fp64
    ],
)
def test_norms_take_the_face_that_the_table_says_is_faster_both_ways(gpu, norm_table, asked, wanted, checked):
    with silent():
        assert norm_face(*asked) == wanted
    assert gpu.checked == checked, "only a face that is used is checked"


@pytest.mark.parametrize(
    ("channels", "bad", "wanted", "checked"),
    [
        (256, ["cuda"], "triton", [IN_CUDA, IN_TRITON]),
        (256, ["triton"], "cuda", [IN_CUDA]),
        (768, ["triton"], "reference", [IN_TRITON]),
        (256, ["cuda", "triton"], "reference", [IN_CUDA, IN_TRITON]),
    ],
)
def test_a_norm_that_is_wrong_on_a_face_runs_on_the_next_with_a_warning(
    gpu, norm_table, recwarn, channels, bad, wanted, checked
):
    gpu.found |= {(NORM, face): verdict(NORM, BAD) for face in bad}
    assert norm_face(channels) == norm_face(channels, 11) == wanted
    told = [f"bn_relu_dropout ({face}, bfloat16) is WRONG" for _, _, face, _ in checked if face in bad]
    assert [line in str(w.message) for line, w in zip(told, recwarn, strict=True)] == [True] * len(told)
    assert gpu.checked == checked


def test_a_machine_without_the_cuda_library_runs_norms_in_triton(gpu, norm_table, monkeypatch):
    monkeypatch.setattr(backends, "why_missing", lambda backend, _: "not built" if backend == "cuda" else None)
    with silent():
        assert norm_face(256) == "triton"
    assert gpu.checked == [IN_TRITON]


def test_norms_are_looked_up_once(gpu, norm_table, monkeypatch):
    assert norm_face(256) == "cuda"
    monkeypatch.setattr(tables, "fastest", lambda *_, **__: pytest.fail("looked up again"))
    assert norm_face(256) == "cuda"
    choose.forget()
    with pytest.raises(pytest.fail.Exception, match="looked up again"):
        norm_face(256)


# ---- panes ----


def test_panes_take_the_gram_form_on_a_gpu_where_it_is_right(gpu):
    gpu.found["panes", "aten", FP16] = verdict("panes", BAD)
    assert choose.pane_form("auto", GPU, torch.bfloat16) == "gram"
    with pytest.warns(RuntimeWarning, match=r"panes \(aten, float16\) is WRONG") as said:
        assert [choose.pane_form("auto", GPU, torch.float16) for _ in range(2)] == ["plain"] * 2
    assert len(said) == 1
    assert gpu.checked == [(GPU, "panes", "aten", BF16), (GPU, "panes", "aten", FP16)]
    assert choose.pane_form("auto", GPU, torch.float64) == "gram"
    assert choose.pane_form("triton", GPU, torch.float16) == "gram"
    assert choose.pane_form("auto", CPU, torch.float32) == "plain"
    assert len(gpu.checked) == 2, "fp64, a named backend and the CPU need no check"


@pytest.mark.parametrize(("form", "status", "wanted"), [
    ("auto", GOOD, True), ("auto", BAD, False), ("gram", BAD, True), ("plain", GOOD, False),
])  # fmt: skip
def test_a_block_takes_the_form_that_was_chosen(gpu, form, status, wanted):
    b = JasperConfig.from_yaml(ROOT / "configs" / "jasper10x5dr.yaml").encoder.blocks[1]
    block = JasperBlock(8, b, [8], pane_form=form)
    gpu.found["panes"] = verdict("panes", status)
    with FakeTensorMode(), warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        sources = [torch.empty(2, 8, t, device=GPU, dtype=torch.float16) for t in (8, 7)]
        assert [block.reads_gram(0, x) for x in sources] == [wanted, False], "14 rows are too few for the Gram form"


class Faces(TorchDispatchMode):
    """Records each call of our ops as (op, face). The face is the argument `bn_face`, or `face` if the op has no
    `bn_face`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        named = {a.name: v for a, v in zip(func._schema.arguments, args)}
        if func.namespace == "jasper_fast":
            self.seen.append((func._schema.name.split("::")[1], named.get("bn_face", named.get("face"))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("channels", "wanted"), [(256, "cuda"), (768, "triton")])
def test_the_ops_run_on_the_face_that_was_chosen(gpu, norm_table, channels, wanted):
    """The statistics, the norm, and the norm with the next conv run on the chosen face, here on fake GPU tensors."""
    with FakeTensorMode(), Faces() as faces:
        y = torch.empty(4, 1000, channels, dtype=torch.bfloat16, device=GPU).transpose(1, 2)
        vectors = [torch.ones(channels, device=GPU) for _ in range(4)]
        assert ops.bn_relu_dropout(y, *vectors, p=0.2).shape == y.shape
        out = ops.sub_block(y, *vectors, torch.ones(96, channels, 3, device=GPU), padding=1, p=0.2)
        assert out.shape == (4, 96, 1000)
    stats = ("bn_stats", wanted)
    assert faces.seen == [stats, (NORM, wanted), stats, ("sub_block", wanted)]


def test_a_convs_statistics_come_from_the_face_of_the_norm_after_it(gpu, norm_table, monkeypatch):
    """The verdict on the norm's face is needed only if the conv computes statistics with backend="auto"."""
    monkeypatch.setattr(rules, "fastest", lambda *_: "aten")
    with FakeTensorMode(), Faces() as faces:
        x = torch.empty(4, 1000, 96, dtype=torch.bfloat16, device=GPU).transpose(1, 2)
        weight = torch.ones(256, 96, 3, device=GPU)
        ops.conv1d(x, weight, padding=1)
        ops.conv1d(x, weight, padding=1, backend="triton", stats=True)
        assert gpu.checked == []
        y, stats = ops.conv1d(x, weight, padding=1, stats=True)
        ops.bn_relu_dropout(y, *(torch.ones(256, device=GPU) for _ in range(4)), stats=stats)
    assert faces.seen[2:] == [("conv1d", "cuda"), (NORM, "cuda")]
    assert gpu.checked == [IN_CUDA]


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_face_of_a_norm_is_a_constant_of_a_compiled_graph(gpu, norm_table, dynamic):
    """A dynamic graph is compiled again for another number of channels, but not for another length."""
    counter = CompileCounter()

    def chosen(y):
        return y * 2, norm_face_of(y, "auto", *y.shape[1:])

    compiled = torch.compile(chosen, backend=counter, fullgraph=True, dynamic=dynamic)
    with FakeTensorMode(), silent():
        for (channels, wanted), frames in itertools.product({384: "reference", 768: "triton"}.items(), (1000, 1300)):
            y = torch.empty(4, frames, channels, dtype=torch.bfloat16, device=GPU).transpose(1, 2)
            assert compiled(y)[1] == wanted
    if dynamic:
        assert counter.frame_count == 2, "a graph for each width, not for each length"


@pytest.mark.parametrize(("use", "calls"), [
    ("", ["conv1d.forward"]),
    ("stats dw", ["conv1d.forward_stats", "conv1d.wgrad"]),
    ("stats dx dw norm", ["conv1d.forward_stats", "conv1d.dgrad_bn", "conv1d.wgrad"]),
])  # fmt: skip
def test_the_calls_of_a_conv_are_those_of_its_use(use, calls):
    assert list(choose.conv_calls(**dict.fromkeys(use.split(), True))) == calls


def test_the_choice_is_a_constant_of_a_compiled_graph():
    def chosen(x, weight):
        c_out, c_in, taps = weight.shape
        face = choose.conv_face(
            "auto", x.device, x.dtype, calls=choose.conv_calls(dw=True), shape=(c_in, c_out, taps, 1, 1)
        )
        return x * len(face) + len(choose.resolve("auto", x.device, NORM))

    x, weight = torch.ones(2, 3, 4), torch.ones(5, 3, 1)
    with silent():  # if the choice were traced, Dynamo would warn; on a GPU it would trace file access too
        assert torch.equal(torch.compile(chosen, backend="eager", fullgraph=True)(x, weight), chosen(x, weight))


def test_a_first_check_may_happen_while_a_graph_is_traced(gpu):
    """The check, which reads files and starts a process, is not traced."""

    def chosen(x):
        return x * len(choose.resolve("auto", torch.device("cuda", 0), NORM, torch.bfloat16))

    assert torch.equal(torch.compile(chosen, backend="eager", fullgraph=True)(torch.ones(2)), torch.full((2,), 6.0))
    assert gpu.checked == [IN_TRITON]
