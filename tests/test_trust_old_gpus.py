"""What `backend="auto"` chooses on a GPU that is too old for Triton."""
# ruff: noqa: F811 (fixtures)

import pytest
import torch
from standins import GPU_NAME, imaginary_gpus_table, verdict, verdicts_of_its_own  # noqa: F401 (fixtures)
from test_trust import BF16, FP16, FP32, GPU, NORM, WHY_MISSING, conv_face, gpu, norm_face, silent  # noqa: F401 (fixtures)

from jasper_fast.dispatch import backends, choose
from jasper_fast.dispatch.verdict import BAD
from jasper_fast.kernels import native
from jasper_fast.kernels.conv1d import cuda_launch, cuda_tiles
from jasper_fast.selfcheck import checks


@pytest.fixture
def turing(gpu, monkeypatch):
    """Pretends that the GPU is an sm_75 with the CUDA library: 40 multiprocessors, 64 KB of shared memory per block."""
    for owner, name, stand_in in (
        (cuda_launch, "gpu", lambda device: cuda_tiles.Gpu(75, 40, 65536)),
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "get_device_capability", lambda device=None: (7, 5)),
        (backends, "why_missing", WHY_MISSING),
        (native, "cuda_available", lambda: True),
    ):
        monkeypatch.setattr(owner, name, stand_in)
    return gpu


def test_a_gpu_before_ampere_takes_the_cuda_face_without_a_table(turing):
    with silent():
        assert norm_face(256, dtype=torch.float16) == norm_face(768, None, torch.float16) == "cuda"
        assert choose.resolve("auto", GPU, NORM, torch.float16) == choose.resolve("auto", GPU) == "cuda"
        assert conv_face(torch.float16) == "cuda" and choose.fused_faces("auto", GPU, torch.float16) == ("cuda",)
        assert conv_face(torch.bfloat16) == "aten" and choose.fused_faces("auto", GPU, torch.float32) == ("aten",)
        assert conv_face(torch.float16, strided_dx=True) == "aten"
        # At stride 2 the input panels of this conv do not fit into shared memory.
        assert choose.conv_face("cuda", GPU, torch.float16, shape=(256, 256, 11, 2, 1), rows_log2=12) == "aten"
    assert {check[1:3] for check in turing.checked} == {(op, "cuda") for op in (NORM, "conv1d", "conv1d.fused")}


def test_without_the_cuda_library_nvrtc_has_the_whole_face(turing, monkeypatch):
    monkeypatch.setattr(native, "cuda_available", lambda: False)
    monkeypatch.setattr(cuda_launch, "way", lambda: "NVRTC")
    with silent():
        assert conv_face(torch.float16) == norm_face(256, dtype=torch.float16) == "cuda"
        assert norm_face(256, dtype=torch.float16, backend="cuda") == "cuda"
        assert choose.conv_face("cuda", GPU, torch.float16) == "cuda"
    assert {op for _, op, *_ in turing.checked} == {NORM, "conv1d"}


@pytest.mark.parametrize(("op", "ask", "wanted", "instead"), [
    ("conv1d", lambda: conv_face(torch.float16), "aten", "PyTorch's own conv instead"),
    (NORM, lambda: norm_face(256, dtype=torch.float16), "reference", "uses plain PyTorch for it instead"),
])  # fmt: skip
def test_a_cuda_face_that_is_wrong_before_ampere_gives_pytorch(turing, op, ask, wanted, instead):
    turing.found[op] = verdict(op, BAD)
    with pytest.warns(RuntimeWarning, match=rf"\(cuda, float16\) is WRONG.*{instead}") as said:
        assert ask() == wanted
    assert len(said) == 1


def test_without_the_cuda_library_before_ampere_both_reasons_are_told(turing, monkeypatch):
    monkeypatch.setattr(native, "cuda_available", lambda: False)
    # The machine that runs this test may have the library, so the reason is replaced.
    monkeypatch.setattr(native, "explain", lambda: {"cuda": "backend 'cuda': not built"})
    with pytest.warns(RuntimeWarning, match="this GPU has 7.5.*backend 'cuda'"):
        assert norm_face(256, dtype=torch.float16) == "reference"


@pytest.mark.parametrize("ask", [
    lambda: choose.resolve("triton", GPU), lambda: norm_face(256, backend="triton"),
    lambda: choose.conv_face("triton", GPU, torch.float16),
], ids=["any op", "norm", "conv"])  # fmt: skip
def test_triton_asked_for_by_name_before_ampere_is_an_error_that_says_why(turing, ask):
    with pytest.raises(backends.BackendMissing, match=r"backend 'triton': .*8\.0 or later, but this GPU has 7\.5"):
        ask()
    assert not backends.is_available("triton", GPU) and choose.resolve("cuda", GPU) == "cuda"
    assert backends.is_available("auto", GPU) and backends.is_available("auto")


def test_the_loss_has_no_kernel_before_ampere_and_a_name_must_be_possible(turing):
    assert [choose.ctc_face(name, GPU) for name in ("auto", "cuda", "reference")] == ["reference"] * 3
    for name in ("cpu", "triton"):
        with pytest.raises(backends.BackendMissing, match=f"backend '{name}': "):
            choose.ctc_face(name, GPU)


def test_ampere_is_young_enough(turing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert choose.resolve("triton", GPU) == choose.resolve("auto", GPU, NORM, torch.bfloat16) == "triton"
    assert [choose.ctc_face(name, GPU) for name in ("auto", "triton", "reference")] == ["triton", "triton", "reference"]
    with pytest.raises(backends.BackendMissing, match=r"backend 'cpu': .* needs CPU tensors, not cuda"):
        choose.ctc_face("cpu", GPU)


def test_convs_are_not_checked_in_bf16_before_ampere(turing):
    assert {check.op for check in checks.plan(GPU, faces=("cuda",), dtypes=(BF16,))} == {NORM}


@pytest.mark.parametrize(("capability", "faces"), [((7, 5), {"cuda", "aten"}), ((8, 6), {"triton", "cuda", "aten"})])
def test_the_plan_has_the_faces_that_the_gpus_age_allows(turing, monkeypatch, tmp_path, capability, faces):
    monkeypatch.setenv("JASPER_FAST_TABLES", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU_NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    plan = checks.plan(GPU)
    assert {check.face for check in plan} == faces
    assert {check.dtype for check in plan} == {FP16, FP32} | ({BF16} if capability >= (8, 0) else set())
