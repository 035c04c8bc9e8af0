"""The command line of bench. A mistake gets a one-line error. The exit status is 1 if a row of ours has no number.
Ctrl-C keeps the finished rows."""

import json

import pytest
import torch
from bench_runs import LIMITS, measured
from conftest import raising

from jasper_fast.bench import cli
from jasper_fast.bench.commands import kernels
from jasper_fast.bench.harness import limits, machine, options, result_file
from jasper_fast.bench.harness.errors import DeviceLost
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.report import html_page
from jasper_fast.kernels import tables

MEASURING = ("kernels", "gpu")  # two of the subcommands that measure rows; --out and --resume work alike in all of them
RUNS = ("kernels", "tune")


@pytest.fixture
def at_once(monkeypatch):
    """Makes runs skip the measurement of the machine's limits and the HTML page."""
    monkeypatch.setattr(limits, "measure", lambda *_: dict(LIMITS))
    monkeypatch.setattr(html_page, "main", lambda *_: 0)


def told(capsys, arguments: list[str]) -> str:
    """Runs a command that must exit with status 2 and print nothing to stdout. Returns the last line of stderr."""
    try:
        assert cli.shell(arguments) == 2
    except SystemExit as end:
        assert end.code == 2
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err
    return err.strip().splitlines()[-1]


# ------------------------------------------------------------------ mistakes


MISTAKES = [
    *([command, "--device", value] for command in RUNS for value in ("mps", "nonsense", "cpu:1")),
    *([command, "--seconds", value] for command in RUNS for value in ("-1", "0", "nan", "soon")),
    *(["kernels", "--threads", value] for value in ("0", "-2", "two")),
    ["kernels", "--rivals", "eager,nonsense"],
    ["train", "--device", "cpu", "--rivals", "openvino"],  # a rival of inference only
    *([command, "--rivals", "compile"] for command in cli.FIXED_RIVALS),
    ["optimizer", "--device", "cpu", "--dtype", "bf16"],
    *([command, "--dtype", "fp8"] for command in (*RUNS, "compile")),
    ["compile", "--arch", "90,hopper"],
    *([command, "--budget", "-5"] for command in ("gpu", "tune")),
    *([command, "--model", value] for command in ("train", "memory", "latency", "profile") for value in ("nosuch", "")),
    *(
        [command, "--model", f"small:{batch}"]
        for command in ("train", "memory")
        for batch in ("8", "8,", "8,400,1", "0,400", "8,-1", "a,b", "")
    ),
    ["train", "--model", "nosuch:8,400"],
    ["latency", "--model", "small:8,400"],
    *(["profile", "--batch", batch] for batch in ("8", "0,400", "eight,400")),
    ["kernels", "--op", "softmax"],
    ["kernels", "--op", "conv1d", "--mode", "inference"],
    ["tune", "--device", "cpu", "--ops", "softmax"],
    ["compile", "--kernel", "["],
    *(["compile", "--processes", value] for value in ("0", "many")),
    ["report", "missing.json"],
    ["report", "--html", "no/such/folder/page.html"],
]


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_is_one_line_that_names_its_option(arguments, capsys, at_once, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = [] if arguments[0] in ("compile", "report") else ["--out", str(tmp_path)]
    line = told(capsys, [*arguments, *out])
    option = next((a for a in arguments[::-1] if a.startswith("--") and a != "--mode"), "results")
    assert "error: " in line and option in line and arguments[-1].split(",")[-1] in line, line


@pytest.mark.parametrize("command", ["train", "memory", "latency", "profile"])
@pytest.mark.parametrize(
    "text",
    ["encoder: [", "encoder: {}\n", "- 1\n", "encoder: {blocks: [{filters: 8, taps: 3}]}\ndecoder: {in_feats: 8}"],
)
def test_a_model_file_that_holds_none_is_told(command, text, capsys, at_once, tmp_path):
    (tmp_path / "net.yaml").write_text(text)
    line = told(capsys, [command, "--model", str(tmp_path / "net.yaml"), "--out", str(tmp_path)])
    assert "--model: " in line and "net.yaml" in line and "jasper10x5" in line, line


@pytest.mark.parametrize(
    ("content", "why"),
    [
        *((text, "not a result") for text in ("", "[]", "{}", "\xff\xfe", '{"rows": [], "schema": 1}')),
        (None, "Is a directory"),
    ],
)
def test_what_is_no_result_is_told(content, why, capsys, tmp_path):
    path = tmp_path / "run.json"
    path.mkdir() if content is None else path.write_bytes(content.encode("latin-1"))
    assert f"{path}: {why}" in told(capsys, ["report", str(path)])


@pytest.mark.parametrize("command", MEASURING)
def test_a_folder_that_cannot_be_written_is_told(command, capsys, at_once, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for folder, why in ((str(file), "is a file; name a folder"), ("/proc/bench", "")):
        assert f"--out {folder}: {why}" in told(capsys, [command, "--device", "cpu", "--out", folder])


@pytest.mark.parametrize("command", MEASURING)
@pytest.mark.parametrize("content", ["{", "[]", '{"rows": 3}'])
def test_a_damaged_file_is_not_resumed(command, content, capsys, at_once, tmp_path):
    damaged = tmp_path / f"{command}_{tables.slug(machine.name(torch.device('cpu')))}_20260101-000000_c.json"
    damaged.write_text(content)
    line = told(capsys, [command, "--device", "cpu", "--out", str(tmp_path), "--resume"])
    assert f"--resume: {damaged}" in line and "delete it" in line
    assert damaged.read_text() == content


def test_a_face_that_the_device_lacks_is_told_before_anything_is_measured(capsys, at_once, tmp_path):
    command = ["kernels", "--device", "cpu", "--backend", "cuda", "--out", str(tmp_path)]
    assert "--backend cuda: the cuda backend needs CUDA tensors" in told(capsys, command)


def test_a_gpu_that_is_not_there_is_told(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device: cuda: this PyTorch sees no GPU" in told(capsys, ["kernels", "--device", "cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "cuda:7: PyTorch sees 2 GPUs; use cuda:0 to cuda:1" in told(capsys, ["kernels", "--device", "cuda:7"])
    assert options.device("cuda:1") == "cuda:1"


def test_what_is_right_is_read():
    read = cli.parser().parse_args
    models = read(["train", "--model", "small", "--model", "configs/jasper10x5dr.yaml:8,1680"]).model
    assert models == [("small", 8, 400), ("configs/jasper10x5dr.yaml", 8, 1680)]
    assert read(["memory", "--model", "small"]).model == [("small", 2, 400)] and read(["profile"]).batch == (8, 400)
    assert read(["kernels", "--rivals", "eager,cudnn"]).rivals == "eager,cudnn"


def test_fixed_rivals_may_be_named(at_once, tmp_path, monkeypatch):
    for command, values in cli.FIXED_RIVALS.items():
        monkeypatch.setattr(getattr(cli, command), "main", lambda *_: None)
        for value in values:
            more = ["--rivals", value, *(["--dtype", "fp32"] if command == "optimizer" else [])]
            assert cli.main([command, *QUICK, "--out", str(tmp_path), *more]) == 0


# ------------------------------------------------------------------ exit status


QUICK = ["--device", "cpu", "--quick", "--seconds", "0.05"]


@pytest.mark.parametrize(
    ("contender", "status"),
    [*(("jasper_fast", status) for status in ("wrong", "failed", "refused", "absent")), ("eager", "wrong")],
)
def test_ours_without_a_number_fails_the_command(contender, status, capsys, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "main", measured("softplus"))
    monkeypatch.setattr(result_file.Results, "fatal", lambda *_: {contender: (status, "why not")})
    assert cli.main(["kernels", *QUICK, "--out", str(tmp_path)]) == (contender == "jasper_fast")
    line = f"jasper_fast has no number (1 {status}) in test op=softplus\n"
    assert capsys.readouterr().err.endswith(line) == (contender == "jasper_fast")


def profiles(**statuses: str) -> dict:
    return {
        "profiles": [
            {"model": "small", "mode": "train", "contender": name, "status": status}
            for name, status in statuses.items()
        ]
    }


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (profiles(jasper_fast="failed", eager="ok"), "jasper_fast has no number (1 failed) in profile of small train"),
        (profiles(jasper_fast="ok", eager="failed"), ""),
        ({"parts": {"one": "finished", "two": "failed: no memory"}}, "parts that failed: two: failed: no memory"),
        ({"parts": {"one": "finished", "two": "cut off"}}, ""),
    ],
)
def test_profiles_of_ours_and_parts_that_failed_fail_the_command(data, why):
    assert cli.shortfall({"rows": []} | data) == why


def test_a_lost_device_fails_the_command(capsys, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "main", raising(DeviceLost("illegal memory access")))
    assert cli.shell(["kernels", *QUICK, "--out", str(tmp_path)]) == 1
    assert "--resume continues without that contender" in capsys.readouterr().err


def test_an_interrupted_run_says_what_it_keeps_and_goes_on(capsys, at_once, tmp_path, monkeypatch):
    def interrupted(run: Run, op: str, mode: str | None) -> None:
        measured("softplus")(run)
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "main", interrupted)
    command = ["kernels", *QUICK, "--out", str(tmp_path)]
    assert cli.main(command) == 130
    (path,) = tmp_path.glob("*.json")
    kept = f"interrupted: 2 rows are in {path}; the same command with --resume continues\n"
    assert capsys.readouterr().err.endswith(kept)
    assert len(json.loads(path.read_text())["rows"]) == 2
    monkeypatch.setattr(kernels, "main", lambda run, op, mode: None)
    assert cli.main([*command, "--resume"]) == 0
    after = json.loads(path.read_text())
    assert list(tmp_path.glob("*.json")) == [path] and len(after["rows"]) == 2 and after["finished"]
