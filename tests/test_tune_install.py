"""`python -m bench tune --install` puts a result into the table of its GPU, or says in an error why not."""

import functools
import json
from pathlib import Path

import pytest
import torch
from standins import GPU, GPU_NAME, imaginary_gpus_table  # noqa: F401

from jasper_fast.bench.cli import main
from jasper_fast.bench.compile import launches
from jasper_fast.bench.tune import table as tune_table
from jasper_fast.kernels import tables

SHAPE = {"c_in": 16, "c_out": 24, "taps": 3, "stride": 1, "dilation": 1}


def result(path: Path, *, gpu: str | None = GPU_NAME, driver: str = "580.1", command: str = "tune", **changes) -> Path:
    """Writes a result file as a run on a GPU leaves it, with one row in its table."""
    tile = {"t": 64, "n": 32, "k": 16, "num_warps": 4, "num_stages": 3, "splits": 1}
    row = tables.Row(op="conv1d.forward", dtype="bfloat16", **SHAPE, rows_log2=12, face="triton", algorithm="direct",
                     tile=tile, time_s=1e-3, registers=90, shared=1024, spilled=0)  # fmt: skip
    data = {"schema": 1, "command": command, "machine": {
        "name": gpu or "a CPU", "gpu": gpu and {"name": gpu, "capability": "sm_90", "driver": driver},
        "packages": {"torch": "2.13.0", "triton": "3.7.1"}, "commit": "abc", "dirty": False, "command": "x",
        "date": "2026",
    }, "rows": [], "limits": {}, "finished": True}  # fmt: skip
    data["table"] = {"header": tune_table.table_header(data), "rows": [row.plain() | changes]}
    path.write_text(json.dumps(data))
    return path


@pytest.fixture(autouse=True)
def own_tables(tmp_path, put_table):
    return tmp_path / "tables"


def install(path: Path, **more) -> int:
    return main(["tune", "--install", str(result(path / "r.json", **more))])


def test_a_result_is_installed_and_chosen_from(tmp_path, own_tables):
    assert install(tmp_path) == 0
    assert tables.lookup("conv1d.forward", GPU, torch.bfloat16, **SHAPE, rows=4096).tile["t"] == 64
    assert [p.name for p in own_tables.iterdir()] == ["nvidia-imaginary-9000.json"]


def test_faces_are_installed_and_chosen_from_and_the_gate_has_no_more_to_compile(tmp_path):
    path = result(tmp_path / "r.json")
    data = json.loads(path.read_text())
    (row,) = data["table"]["rows"]
    row |= dict.fromkeys(("tile", "registers", "shared", "spilled")) | tables.shape_of_norm(256)
    times = {"triton": (2.0, 3.0), "cuda": (3.0, 1.0)}
    data["table"]["rows"] = [
        row | {"op": op, "face": face, "time_s": spent}
        for face, both in times.items()
        for op, spent in zip(tables.NORM_OPS, both, strict=True)
    ]
    path.write_text(json.dumps(data))
    assert main(["tune", "--install", str(path)]) == 0
    fastest = functools.partial(
        tables.fastest, device=GPU, dtype=torch.bfloat16, **tables.shape_of_norm(256), rows=4096
    )
    assert (fastest(tables.NORM_OPS), fastest(tables.NORM_OPS[:1])) == ("cuda", "triton")
    assert list(launches.measured(90, "bfloat16")) == [], "a face without tiles adds nothing to compile"


def test_results_of_the_same_versions_add_up_and_others_are_replaced(tmp_path):
    assert install(tmp_path) == install(tmp_path, dtype="float16") == install(tmp_path, time_s=5e-4) == 0
    assert [(r.dtype, r.time_s) for r in tables.for_gpu(GPU_NAME).rows] == [("bfloat16", 5e-4), ("float16", 1e-3)]
    assert install(tmp_path, driver="581.0", op="conv1d.dgrad") == 0
    assert [r.op for r in tables.for_gpu(GPU_NAME).rows] == ["conv1d.dgrad"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: result(path, gpu=None), "install the result of a GPU"),
        (lambda path: result(path, spilled=8), "row 1: the kernel spills 8 bytes"),
        (lambda path: path, "No such file"),
        (lambda path: path.write_text("[]") and path, "not a result of python -m bench (it is not a JSON object)"),
        (lambda path: result(path, command="kernels"), "not a result of `python -m bench tune`"),
    ],
    ids=["stand-in", "faulty row", "no file", "no object", "another command"],
)
def test_what_is_no_result_of_a_gpu_is_refused(tmp_path, own_tables, make, told, capsys):
    assert main(["tune", "--install", str(make(tmp_path / "r.json"))]) == 1
    assert told in capsys.readouterr().err
    assert not own_tables.exists()
