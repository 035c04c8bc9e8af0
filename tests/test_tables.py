"""Tables of measured choices: look-ups, checks of the file, and that a new length compiles nothing new."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from standins import GPU, GPU_NAME, imaginary_gpus_table  # noqa: F401

from jasper_fast.kernels import table_rows, tables

HEADER = {
    "gpu": GPU_NAME, "capability": "sm_90", "multiprocessors": "132", "bandwidth": "3350 GB/s",
    "driver": "580.1", "torch": "2.13.0", "triton": "3.7.1", "commit": "abc",
    "command": "python -m bench tune", "date": "2026-01-01",
}  # fmt: skip
TILE = {"t": 128, "n": 128, "k": 64, "num_warps": 8, "num_stages": 3, "splits": 1}
SHAPE = {"c_in": 768, "c_out": 768, "taps": 25, "stride": 1, "dilation": 1}


def row(**changes) -> tables.Row:
    return tables.Row(**({
        "op": "conv1d.forward", "dtype": "bfloat16", **SHAPE, "rows_log2": 12, "face": "triton", "algorithm": "direct",
        "tile": TILE, "time_s": 1e-3, "registers": 200, "shared": 98304, "spilled": 0,
    } | changes))  # fmt: skip


def library(**changes) -> tables.Row:
    return row(**({
        "face": "aten", "algorithm": "library", "tile": None, "registers": None, "shared": None, "spilled": None,
    } | changes))  # fmt: skip


def look(
    rows: int, op: str = "conv1d.forward", dtype=torch.bfloat16, face: str = "triton", **changes
) -> tables.Row | None:
    return tables.lookup(op, GPU, dtype, **(SHAPE | changes), rows=rows, face=face)


def test_a_row_comes_back_as_written(put_table):
    path = put_table([row(), library(time_s=2e-3)], **HEADER)
    assert look(4096) == row() and look(4096, face="aten") == library(time_s=2e-3)
    assert tables.load(path).header == HEADER


def test_nothing_is_found_for_unknown_gpus_devices_and_shapes(put_table, monkeypatch):
    put_table([row()])
    assert tables.lookup("conv1d.forward", torch.device("cpu"), torch.bfloat16, **SHAPE, rows=4096) is None
    ops = [{"op": "conv1d.wgrad"}, {"op": "an op of tomorrow"}]
    for other in ({"dtype": torch.float16}, {"dtype": torch.float64}, {"c_in": 767}, {"face": "cuda"}, *ops):
        assert look(4096, **other) is None
    monkeypatch.setattr(tables, "_gpu_name", lambda index: "NVIDIA Unheard-of")
    assert look(4096) is None


@pytest.mark.parametrize(
    ("rows", "bucket"), [(1, 0), (2, 1), (3, 2), (4, 2), (4095, 12), (4096, 12), (4097, 13), (1 << 45, 45)]
)
def test_rows_go_to_the_power_of_two_at_or_above(rows, bucket):
    assert tables.bucket(rows) == bucket


@pytest.mark.parametrize(("rows", "found"), [(1, 8), (256, 8), (900, 8), (1025, 14), (2000, 14), (1 << 45, 14)])
def test_the_nearest_measured_rows_serve(put_table, rows, found):
    put_table([row(rows_log2=8), row(rows_log2=14)])
    assert look(rows).rows_log2 == found


def test_of_several_algorithms_the_fastest_is_taken(put_table, monkeypatch):
    monkeypatch.setitem(table_rows._ROW, "algorithm", table_rows._one_of((*tables.ALGORITHMS, "fast_fir_1")))
    put_table([row(time_s=3.0), row(time_s=2.0, algorithm="fast_fir_1")])
    assert look(4096).algorithm == "fast_fir_1"


def test_faces_are_compared_within_a_bucket_and_over_all_ops(put_table):
    ops, shape = ("conv1d.forward", "conv1d.wgrad"), tuple(SHAPE.values())
    put_table([
        row(time_s=1.0), library(time_s=2.0), row(rows_log2=8, time_s=5.0), library(rows_log2=8, time_s=0.1),
        row(op="conv1d.wgrad", time_s=4.0), library(op="conv1d.wgrad", time_s=2.5),
    ])  # fmt: skip
    for of, rows, face in (
        (ops[:1], 4096, "triton"),
        (ops[:1], 200, "aten"),
        (ops, 4096, "aten"),  # 1 + 4 > 2 + 2.5
        (ops[:1], None, "triton"),  # at the largest measured number of rows
        ((*ops, "conv1d.dgrad"), 4096, None),
    ):
        assert tables.fastest(of, GPU, torch.bfloat16, **SHAPE, rows=rows) == face
    calls = [(ops[0], shape, 2), (ops[1], shape, 1)]
    assert tables.times(calls, GPU, torch.bfloat16, 4096) == {"triton": 6.0, "aten": 6.5}, "2 * 1 + 4, 2 * 2 + 2.5"
    assert tables.times([*calls, ("conv1d.fused", shape, 1)], GPU, torch.bfloat16, 4096) is None


def test_norms_are_found_by_their_channels(put_table):
    norm = library(op="bn_relu_dropout.forward", **tables.shape_of_norm(384), face="cuda", algorithm="direct")
    put_table([norm, row()])
    for face, channels, found in (("cuda", 384, norm), ("triton", 384, None), ("cuda", 768, None)):
        assert look(4096, op="bn_relu_dropout.forward", face=face, **tables.shape_of_norm(channels)) == found


def test_a_file_is_read_once(put_table, monkeypatch):
    put_table([row()])
    first = look(4096)
    monkeypatch.setattr(tables, "load", lambda path: pytest.fail("the file was read again"))
    assert look(4096) is look(3000) is first


def test_a_forced_tile_holds_on_any_device_and_ends_with_its_block(put_table):
    put_table([row()])
    small = TILE | {"t": 16}
    with tables.forced("conv1d.forward", small):
        assert tables.lookup("conv1d.forward", torch.device("cpu"), torch.float32, **SHAPE, rows=1).tile == small
        assert look(4096, op="conv1d.wgrad") is None
        with pytest.raises(KeyError), tables.forced("conv1d.forward", TILE):
            assert look(1).tile == TILE
            raise KeyError
        assert look(1).tile == small
    assert look(4096) == row()


FAULTS = {
    "unknown op": ({"op": "conv2d"}, "op must be one of conv1d.forward"),
    "dtype": ({"dtype": "float64"}, "dtype must be one of float32"),
    "face": ({"face": "magic"}, "face must be one of triton"),
    "channels as text": ({"c_in": "768"}, "c_in must be a positive whole number, got '768'"),
    "a truth value for a number": ({"taps": True}, "taps must be"),
    "no rows": ({"rows_log2": -1}, "rows_log2 must be"),
    "no time": ({"time_s": 0.0}, "time_s must be"),
    "NaN": ({"time_s": float("nan")}, "time_s must be"),
    "spills": ({"spilled": 8}, "spills 8 bytes"),
    "shared memory": ({"shared": 300000}, "sm_90 has 232448"),
    "no tile": ({"tile": None}, "needs a tile"),
    "a tile too many": ({"face": "aten"}, "has no tile"),
    "a tile of 96 frames": ({"tile": TILE | {"t": 96}}, "tile: t must be a power of two from 16 to 256, got 96"),
    "a tile without stages": (
        {"tile": {k: v for k, v in TILE.items() if k != "num_stages"}},
        "tile: unknown or missing fields: num_stages",
    ),
    "registers": ({"tile": TILE | {"t": 256, "n": 256, "num_warps": 4}}, "do not fit the registers of 128 threads"),
    "stages": ({"tile": TILE | {"num_stages": 9}}, "num_stages must be"),
    "stages beyond shared memory": ({"tile": TILE | {"k": 256, "num_stages": 4}}, "its stages take at least"),
    "splits": ({"tile": TILE | {"splits": 2}}, "conv1d.forward does not split its reduction"),
    "a norm of a conv's shape": (
        {"op": "bn_relu_dropout.forward", "tile": None},
        "bn_relu_dropout.forward must have its channels as c_in and c_out",
    ),
    "a norm of two widths": (
        {"op": "bn_relu_dropout.backward", "tile": None, "taps": 1, "c_out": 384},
        "and 1 for taps, stride and dilation",
    ),
    "a norm's tile": ({"op": "bn_relu_dropout.forward", "taps": 1}, "bn_relu_dropout.forward on triton has no tile"),
    "a field too many": ({"speed": 1}, "unknown or missing fields: speed"),
}


def error_of(path: Path, text: str) -> str:
    """Returns the error that a look-up raises when the table's file has this content."""
    path.write_text(text)
    tables._index.cache_clear()
    with pytest.raises(tables.TableError) as raised:
        look(4096)
    return str(raised.value)


@pytest.mark.parametrize(("changes", "told"), FAULTS.values(), ids=FAULTS.keys())
def test_a_faulty_row_is_an_error_that_names_file_and_row(put_table, changes, told):
    path = put_table([row()])
    data = json.loads(path.read_text())
    data["rows"].append(data["rows"][0] | {"rows_log2": 3} | changes)
    error = error_of(path, json.dumps(data))
    assert error.startswith(f"{path}: row 2: ") and told in error


def test_an_operand_too_large_for_one_gpu_fits_another(put_table):
    tall = TILE | {"t": 256, "n": 128, "k": 64, "num_stages": 4}
    put_table([row(tile=tall, shared=None)])
    with pytest.raises(tables.TableError, match="a program has 101376"):
        put_table([row(tile=tall, shared=None)], capability="sm_89")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[]", "a table is an object with a header and a list of rows"),
        ('{"header": {}, "rows": []}', "header: unknown or missing fields: bandwidth, capability"),
        (json.dumps({"header": HEADER | {"driver": 580}, "rows": []}), "driver must be a text"),
        (json.dumps({"header": HEADER | {"capability": "9.0"}, "rows": []}), "must be a text like sm_90"),
        (json.dumps({"header": HEADER | {"gpu": "another"}, "rows": []}), "gpu is 'another'"),
        (json.dumps({"header": HEADER, "rows": [row().plain()] * 2}), "row 2: the same key as row 1"),
    ],
)
def test_a_faulty_file_is_an_error(put_table, text, told):
    path = put_table([row()])
    error = error_of(path, text)
    assert str(path) in error and told in error


def test_writing_a_faulty_table_leaves_the_old_one(put_table):
    path = put_table([row()])
    before = path.read_text()
    with pytest.raises(tables.TableError, match="spills 4 bytes"):
        tables.write(path, HEADER, [row(spilled=4)])
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_committed_tables_hold_what_they_must():
    where = Path(tables.__file__).with_name("tables")
    for path in where.glob("*.json"):
        assert path.stem == tables.slug(tables.load(path).header["gpu"])
    assert (where / "README.md").is_file()


# Prints, for each launch by the Triton faces of conv1d and bn_relu_dropout, what Triton compiles. No kernel runs.
KEYS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from jasper_fast.kernels import aot, launch
from jasper_fast.kernels.bn_relu_dropout import triton_impl as bn
from jasper_fast.kernels.conv1d import triton_impl as conv
from jasper_fast.kernels.operands import Geometry, Lengths, Mask, Norm

dtype, seen = torch.float16, []
kinds = json.loads(sys.argv[2])
arch = 90 if kinds["descriptors"] else 80

def take(one):
    made = aot.source(one, arch)
    types = {n: (made.signature[n], made.constants.get(n), made.attrs.get((i,))) for i, n in enumerate(made.signature)}
    seen.append((one.name, {k: str(v) for k, v in (types | made.options).items()}))

def calls():
    for n, t in kinds["batches"]:
        for c_in, c_out, k, stride, dilation in kinds["shapes"]:
            how = Geometry(stride, (k // 2) * dilation, dilation)
            t_out = how.frames(t, k)
            ntc = lambda c, frames: torch.zeros(n, frames, c, dtype=dtype).transpose(1, 2)
            x, dy, w = ntc(c_in, t), ntc(c_out, t_out), torch.zeros(c_out, c_in, k)
            odd = t % 2  # lengths and seeds are slices, which are not aligned to 16 bytes if T is odd
            lengths, seed = torch.zeros(n + 1, dtype=torch.int64)[odd:][:n], torch.zeros(2, dtype=torch.int64)[odd:][:1]
            norm, mask = Norm(*(torch.zeros(c_in) for _ in range(4))), Mask(lengths, seed, 0.2)
            for call in kinds["calls"]:
                start = len(seen)
                if call == "fused":
                    pack, half = conv.pack(w, dtype), lengths // 2
                    more = {"bias": torch.zeros(c_out)}
                    conv.fused(x.transpose(1, 2), pack, how, relu=True, lengths=Lengths(lengths, half), **more)
                    conv.fused(x.transpose(1, 2), pack, how, workspace=conv.Workspace("cpu"), **more)
                    features = torch.zeros(n, c_in, t).transpose(1, 2)
                    conv.fused(features, pack, how, lengths=Lengths(lengths, made=half), **more)
                    if stride == 1:
                        panes = torch.zeros(n, t_out, 72, dtype=dtype)[:, :, :64]
                        pack2 = conv.pack(torch.zeros(c_out, 64, 1), dtype)
                        conv.fused(x.transpose(1, 2), pack, how, panes=(panes, pack2), **more)
                elif call == "conv":
                    conv.forward(x, w, how, lengths)
                    conv.forward_stats(x, w, how, lengths)
                    conv.wgrad(x, dy, k, how, lengths)
                    if stride == 1:
                        conv.dgrad(dy, w, t, how, lengths)
                        conv.dgrad_bn(dy, w, how, x, x, norm, mask)
                else:
                    bn.stats(x)
                    bn.forward(x, norm, None, mask)
                    bn.backward_reduce(x, x, None, norm, mask)
                    bn.backward_apply(x, x, None, norm, norm[:2], mask, False)
                for name, values in seen[start:]:
                    print(json.dumps([call, name, [c_in, c_out, k, stride, dilation], values]))
                del seen[start:]

with launch.recorded(take, arch):
    calls()
"""


# The largest number of variants of a kernel per conv shape. A conv kernel has two for each combination of the flags
# used here, because there are two default tiles for T up to 40.
MOST = {"conv": 4, "bn": 1, "fused": 8}


@pytest.mark.slow
@pytest.mark.parametrize("descriptors", [False, True])
def test_launches_do_not_compile_anew_for_every_length_and_batch(descriptors):
    pytest.importorskip("triton")
    # T is 1, odd, even, or a multiple of 8 or 16, and lies below or above the sizes of the tiles
    batches = [(2, t) for t in (1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 37, 40)] + [(n, 37) for n in (1, 3, 4, 16)]
    shapes = [(64, 48, 11, 1, 1), (29, 32, 3, 1, 2), (64, 64, 11, 2, 1)]
    kinds = json.dumps({"batches": batches, "shapes": shapes, "calls": [*MOST], "descriptors": descriptors})
    done = subprocess.run([sys.executable, "-c", KEYS, ROOT, kinds], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]  # (call, kernel, conv shape, what it compiles)
    assert min(Counter(call for call, *_ in found).values()) >= 5 * len(batches)
    by_launch: dict[tuple, set[str]] = defaultdict(set)
    for call, name, shape, values in found:
        # flags, alignment, tile and compiler settings: launches that agree in these must compile the same kernel
        chosen = {k: v for k, v in values.items() if "constexpr" in v or k.startswith("num_")}
        by_launch[call, name, *shape, *sorted(chosen.items())].add(json.dumps(values, sort_keys=True))
    many = {key: len(keys) for key, keys in by_launch.items() if len(keys) > 1}
    assert not many, f"launches that differ only in N or T are compiled separately: {many}"
    per_kernel = Counter(key[:7] for key in by_launch)  # by call, name and shape
    assert all(count <= MOST[key[0]] for key, count in per_kernel.items()), (
        f"flags or tiles follow N or T: {per_kernel}"
    )
