"""The gate that compiles all kernels ahead of time: each rule finds the fault that it is made for, and differences from
the committed table are reported."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from bench_runs import ROOT

from jasper_fast.bench import cli
from jasper_fast.bench.compile import cuda
from jasper_fast.bench.compile.table import COMMITTED

triton = pytest.importorskip("triton")
gate = pytest.importorskip("jasper_fast.bench.compile.gate")
launches = pytest.importorskip("jasper_fast.bench.compile.launches")
aot = pytest.importorskip("jasper_fast.kernels.aot")

TABLE = gate.TABLE
GOOD = {
    "registers": 128, "spilled": 0, "shared": 98304, "dots": 2, "dot_rows": 128, "wgmma": 8, "mma_sync": 0,
    "tcgen05": 0, "tma": 6, "cp_async": 24, "wide_loads": 0, "wide_stores": 8, "narrow_loads": 0, "waiting_loads": 0,
    "nan_eaters": 0,
}  # fmt: skip
AMPERE = GOOD | {"wgmma": 0, "mma_sync": 64, "tma": 0}
POINTWISE = AMPERE | {"dots": 0, "dot_rows": 0, "mma_sync": 0, "cp_async": 0, "wide_loads": 8, "shared": 0}


def job(
    arch: int = 90, dtype: str = "float16", kernel: str = "conv1d fused", layer: str = "any", **constants
) -> gate.Job:
    return gate.Job(
        arch, dtype, kernel, layer, SimpleNamespace(constants=constants, options={"num_warps": 8, "num_stages": 3})
    )


def complaints(of, facts: dict) -> set[str]:
    """Returns the names of the rules that a kernel with these facts breaks."""
    return {rule.name for rule in gate.RULES if rule.complaint(of, facts)}


SMALL = {"dot_rows": 32, "wgmma": 0, "mma_sync": 64}  # a tile too small for a warp group; only fp32 has such tiles
BLACKWELL = GOOD | {"wgmma": 0, "tcgen05": 16}
EXACT, ROUNDED = {"dtype": "float32", "PRECISION": "ieee"}, {"dtype": "float32", "PRECISION": "tf32"}
BN, LAST = "bn_relu_dropout forward", GOOD | {"nan_eaters": 9, "wide_stores": 0}


@pytest.mark.parametrize(
    ("rules", "of", "facts"),
    [
        (set(), job(), GOOD),
        (set(), job(80), AMPERE),
        (set(), job(100), BLACKWELL),
        (set(), job(80, kernel=BN), POINTWISE),
        (set(), job(90, **ROUNDED), GOOD | SMALL),
        (set(), job(80, **EXACT), AMPERE | {"mma_sync": 0, "cp_async": 0}),
        # Two kernels are exempt from some rules: the merge of the statistics, and the last conv. The first conv is not.
        (set(), job(80, kernel="conv1d stats merge"), POINTWISE | {"spilled": 8, "wide_stores": 0}),
        (set(), job(kernel="conv1d last"), LAST),
        ({"a NaN passes", "16-byte accesses"}, job(kernel="conv1d first"), LAST),
        ({"tensor cores"}, job(90), GOOD | SMALL),
        ({"no spill"}, job(), GOOD | {"spilled": 8}),
        ({"shared memory fits"}, job(86), AMPERE | {"shared": 101377}),
        ({"shared memory fits"}, job(80), AMPERE | {"shared": 166913}),
        ({"shared memory fits"}, job(100), BLACKWELL | {"shared": 232449}),
        ({"tensor cores"}, job(), GOOD | {"wgmma": 0}),
        ({"tensor cores"}, job(), GOOD | {"wgmma": 1}),
        ({"tensor cores"}, job(), GOOD | {"mma_sync": 32}),
        ({"tensor cores"}, job(80), AMPERE | {"mma_sync": 0}),
        ({"tensor cores"}, job(89, **ROUNDED), AMPERE | {"mma_sync": 0}),
        ({"tensor cores"}, job(100), GOOD),
        ({"exact fp32"}, job(80, **EXACT), AMPERE),
        ({"exact fp32"}, job(90, **EXACT), GOOD),
        ({"exact fp32"}, job(100, **EXACT), BLACKWELL),
        ({"asynchronous copies"}, job(), GOOD | {"tma": 0}),
        ({"asynchronous copies"}, job(100), BLACKWELL | {"tma": 0}),
        ({"asynchronous copies"}, job(89), AMPERE | {"cp_async": 0}),
        ({"asynchronous copies"}, job(80), AMPERE | {"waiting_loads": 4}),
        ({"no 16-bit scalar loads"}, job(80), AMPERE | {"narrow_loads": 1}),
        ({"16-byte accesses"}, job(80, kernel=BN), POINTWISE | {"wide_loads": 0}),
        ({"16-byte accesses"}, job(), GOOD | {"wide_stores": 0}),
        ({"a NaN passes"}, job(80, kernel=BN), POINTWISE | {"nan_eaters": 8}),
    ],
)
def test_the_rules_that_a_kernel_breaks_are_named(rules, of, facts):
    assert complaints(of, facts) == rules


@pytest.mark.parametrize("arch", [80, 90])
def test_every_fp32_product_has_a_row_rounded_to_tf32_and_an_exact_one(arch):
    """PyTorch's TF32 setting decides which of the two kernels is launched."""
    found = {"tf32": set(), "ieee": set()}
    for kernel, layer, source in launches.recorded(arch, "float32"):
        values = source.constants
        if kernel.startswith("ctc"):  # CTC kernels do not depend on the setting
            continue
        if (precision := values.pop("PRECISION", None)) is not None:
            assert kernel.endswith(" ieee") == (precision == "ieee")
            del values["BLOCK_T"]  # exact inference takes fewer frames per program
            named = (kernel.removesuffix(" ieee"), layer.split(" T")[0])
            found[precision].add((*named, *sorted((k, repr(v)) for k, v in values.items())))
    assert found["ieee"] and found["ieee"] == found["tf32"]


def test_differences_show_old_and_new():
    a, b, c = ((80, "float16", name, "T128", "any") for name in ("a", "b", "c"))
    rows = {key: dict(zip(TABLE.key, key, strict=True)) | GOOD for key in (a, b, c)}
    assert TABLE.differences(
        {k: rows[k] for k in (a, b)}, {a: rows[a] | {"registers": 130, "spilled": 8}, c: rows[c]}
    ) == [
        "sm_80 float16 a [T128] any: registers 128 -> 130, spilled 0 -> 8",
        "sm_80 float16 c [T128] any: new, not in the committed table",
        "sm_80 float16 b [T128] any: in the committed table, but no longer compiled",
    ]
    assert TABLE.differences(rows, rows) == []
    text = TABLE.text("3.7.1", rows)
    assert TABLE.read(text) == rows and len(text.splitlines()) == len(rows) + 2


def test_every_cuda_kernel_with_products_is_in_the_table():
    names = re.findall(
        r"__global__ void .*?\b((?:conv|wgrad)_\d+)\(", (ROOT / "csrc/cuda/conv1d_launch.cuh").read_text()
    )
    tables = [cuda.TABLE.read(path.read_text()) for path in COMMITTED.glob("nvcc-*.json")]
    assert len(names) == 6 and tables
    for rows in tables:
        assert set(names) <= {kernel.split()[0] for _, kernel in rows}
        assert not [line for row in rows.values() for line in cuda.complaints(row)]
    wrong = next(row for (_, kernel), row in tables[0].items() if kernel.startswith("wgrad_90")) | {
        "wgmma": 0,
        "waits": 3,
    }
    assert cuda.complaints(wrong) == ["3 waits between products of one step", "no wgmma instruction"]


def test_innermost_loops_of_ptx():
    ptx = "$L_a:\n one\n$L_b:\n two\n@%p1 bra $L_b;\n three\n@%p2 bra $L_a;\n bra $L_c;\n four\n$L_c:\n five\n"
    (loop,) = aot.innermost_loops(ptx)
    assert "two" in loop and "one" not in loop and "three" not in loop


@pytest.fixture(scope="module")
def made() -> dict:
    """Returns the facts about the kernels of tests/gate_kernels.py, compiled in a process without the interpreter."""
    return json.loads(run([str(ROOT / "tests" / "gate_kernels.py")]).stdout)


def run(arguments: list[str], **env: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | env
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done


@pytest.mark.slow
def test_facts_of_kernels_that_break_the_rules_on_purpose(made):
    """`where(x <= 0, 0, x)`, the ReLU of all our kernels, compiles to a select. A maximum would drop a NaN."""
    judged = {name: complaints(job(80), facts) for name, facts in made.items() if isinstance(facts, dict)}
    assert judged["good"] == set()
    assert judged["spilling"] == {"no spill", "shared memory fits"}
    assert judged["scalar"] >= {"no 16-bit scalar loads", "asynchronous copies"}
    assert judged["through registers"] == {"asynchronous copies"} and made["through registers"]["cp_async"] > 0
    assert made["narrow tile"]["dot_rows"] == 16 and made["good"]["dot_rows"] == 64
    assert made["good on sm_90"]["wgmma"] > 0 == made["good on sm_90"]["mma_sync"]
    assert made["good"]["mma_sync"] > 0 == made["good"]["wgmma"]
    assert made["maximum"]["nan_eaters"] > 0 < made["maximum"]["sass_maxima"]
    assert made["select"]["nan_eaters"] == made["select"]["sass_maxima"] == 0


def test_the_cache_key_is_that_of_the_code(made):
    a, b, *others = made["digests"]  # the others differ in alignment, stages or architecture
    assert a == b and len({a, *others}) == 4


# ------------------------------------------------------------------ the command

KERNELS = ("conv1d forward", "conv1d fused")
PART = ["compile", "--arch", "90", "--dtype", "fp16", "--kernel", f"^({'|'.join(KERNELS)})$", "--processes", "1"]


@pytest.mark.slow
def test_part_of_the_committed_table_holds(tmp_path):
    """`make compile` checks the whole table."""
    table = tmp_path / "table.json"
    # With TRITON_INTERPRET the command starts a process without it, in which Triton compiles.
    done = run(["-m", "bench", *PART, "--no-cache", "--update", "--table", str(table)], TRITON_INTERPRET="1")
    assert done.returncode == 0 and "sm_90 float16 conv1d fused" in done.stdout and "0 broken rules" in done.stdout
    found = TABLE.read(table.read_text())
    committed = COMMITTED / f"triton-{triton.__version__}.json"
    if not committed.exists():
        pytest.skip(f"no table for Triton {triton.__version__}")
    known = TABLE.read(committed.read_text()).items()
    assert (
        TABLE.differences({key: row for key, row in known if key[:2] == (90, "float16") and key[2] in KERNELS}, found)
        == []
    )


def test_a_table_that_differs_fails_and_update_puts_it_right(tmp_path, monkeypatch, capsys):
    def command(*options: str) -> tuple[int, str]:
        return cli.main([*PART, "--table", str(table), "--out", str(tmp_path), *options]), capsys.readouterr().out

    # with TRITON_INTERPRET set, gate would start another process
    monkeypatch.setattr(gate, "os", SimpleNamespace(environ={}))
    facts = dict(GOOD)
    monkeypatch.setattr(gate.Job, "digest", gate.Job.key)  # an interpreted kernel has no digest
    monkeypatch.setattr(gate, "compiled", lambda todo, *_: {job.digest: facts for job in todo})
    table = tmp_path / "table.json"
    status, told = command()
    assert status == 1 and "FAILED there is no table for Triton" in told
    assert command("--update")[0] == command()[0] == 0
    rows = TABLE.read(table.read_text())
    first, elsewhere = next(iter(rows.values())), {"arch": 80}
    changed = TABLE.by_key([first | {"registers": 129}, *list(rows.values())[1:], first | elsewhere])
    table.write_text(TABLE.text(triton.__version__, changed))
    status, told = command()
    assert status == 1 and "registers 129 -> 128" in told and "0 broken rules, 1 changes" in told
    assert command("--update")[0] == 0
    assert TABLE.read(table.read_text()) == rows | TABLE.by_key([first | elsewhere]), "rows of other kernels stay"
    facts["spilled"] = 8
    assert command("--update")[0] == 1
    (written,) = tmp_path.glob("compile_*.json")
    assert all("no spill: 8 bytes" in line for line in json.loads(written.read_text())["broken"])
