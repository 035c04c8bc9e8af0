"""A real result of the command line, the page made from it, and the README's table."""

import json
import re

import pytest
from bench_runs import goal_rows

from jasper_fast.bench import cli
from jasper_fast.bench.cases import bn_relu_dropout
from jasper_fast.bench.report import html_page, readme_table


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Runs the command line on tiny shapes and returns the path of its result."""
    out = tmp_path_factory.mktemp("bench")
    arguments = ["kernels", "--op", "bn_relu_dropout", "--device", "cpu", "--quick", "--backend", "reference"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bn_relu_dropout, "CPU_SHAPES", ((2, 8, 40), (2, 16, 40)))
        assert cli.main([*arguments, "--seconds", "0.05", "--out", str(out)]) == 0
    (path,) = out.glob("kernels_*.json")
    return path


@pytest.mark.slow
def test_result_says_how_to_repeat_it(result):
    data = json.loads(result.read_text())
    assert data["finished"] and data["schema"] == 1
    assert data["machine"]["packages"]["torch"] and data["machine"]["threads"] and data["machine"]["cpu"]["cores"]
    assert data["limits"]["matmul_flops_per_s"]["float32"] > 1e9 and data["limits"]["copy_bytes_per_s"] > 1e8
    for row in data["rows"]:
        least = 1 if row.get("hurried") else 3  # on a busy machine a row may be timed in fewer rounds than usual
        assert row["status"] == "ok" and row["limit"]["share"] > 0 and row["time_s"]["samples"] >= least, row
    assert len({row["id"] for row in data["rows"]}) == len(data["rows"]) == 9


@pytest.mark.slow
def test_report_is_one_page_that_needs_nothing_else(result, tmp_path):
    page = tmp_path / "page.html"
    assert cli.main(["report", str(result), str(result), "--html", str(page)]) == 0
    html = page.read_text()
    assert not re.search(r'(?:src|href)="|url\(|@import|https?://', html)
    for part in (
        "<svg",
        "viewport",
        "prefers-color-scheme: dark",
        "Comparison",
        "Every timed row",
        "Not measured here",
    ):
        assert part in html
    assert html.count("<table") == html.count("</table>") and html.count("<svg") == html.count("</svg>")
    assert "nan" not in re.findall(r'="([^"]*)"', html)


def test_readme_table_goes_between_its_markers(result, tmp_path):
    data = json.loads(result.read_text())
    data["rows"] = goal_rows()
    path, readme = tmp_path / "r.json", tmp_path / "README.md"
    path.write_text(json.dumps(data))
    readme.write_text(f"above\n{readme_table.BEGIN}\nold\n{readme_table.END}\nbelow\n")
    assert readme_table.write([html_page.load(path)], readme) == 0
    once = readme.read_text()
    assert once.startswith("above\n") and once.endswith("\nbelow\n") and "old" not in once
    assert once.count("\n|---") == 1 and "4.50x [4.40, 4.60]" in once and "0.30 of eager's" in once
    readme_table.write([html_page.load(path)], readme)
    assert readme.read_text() == once
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="markers"):
        readme_table.write([html_page.load(path)], readme)


@pytest.mark.parametrize("command", [*cli.COMMANDS, "compile", "report"])
def test_every_subcommand_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and "--" in capsys.readouterr().out
