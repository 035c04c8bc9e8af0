"""Two results of one machine: ratios agree if their intervals overlap."""

import copy
import json

from jasper_fast.bench.report import html_page, readme_table
from jasper_fast.bench.report.agreement import agreement


def row(name: str, low: float, high: float, pairs: int = 9) -> dict:
    return {
        "id": name, "bench": "kernels", "key": {"op": name}, "contender": "eager", "ours": False, "status": "ok",
        "dtype": "float32", "time_s": {"median": 1.0, "p20": 1.0, "p80": 1.0, "p99": 1.0},
        "ratio": {"median": (low + high) / 2, "low": low, "high": high, "confidence": 0.95, "pairs": pairs},
    }  # fmt: skip


def result(*rows: dict) -> dict:
    return {"rows": list(rows)}


def test_intervals_that_touch_agree_and_others_are_named():
    first = result(row("a", 1.0, 1.2), row("b", 2.0, 2.1), row("c", 3.0, 3.1), row("only here", 1.0, 1.0))
    second = result(row("a", 1.2, 1.4), row("b", 2.2, 2.3), row("c", 2.8, 2.9), row("only there", 1.0, 1.0))
    found = agreement(first, second)
    assert (found.rows, found.apart) == (3, ("b", "c"))
    assert "1 of 3 rows (33 %)" in str(found)


def test_failed_rows_and_rows_without_a_ratio_do_not_count():
    ours = row("ours", 1.0, 1.0)
    del ours["ratio"]
    rows = result(ours, row("wrong", 1.0, 1.0) | {"status": "wrong"})
    found = agreement(rows, rows)
    assert found.rows == 0 and "no row" in str(found)


def test_rows_of_too_few_pairs_for_an_interval_are_told_and_not_counted():
    few, enough = row("few", 1.0, 1.0, pairs=5), row("few", 1.0, 1.0, pairs=6)
    apart = row("apart", 1.0, 1.1), row("apart", 2.0, 2.1)
    found = agreement(result(few, apart[0]), result(enough, apart[1]))
    assert (found.rows, found.apart, found.too_few) == (1, ("apart",), 1)
    assert str(found) == "intervals of the ratios overlap in 0 of 1 rows (0 %); 1 row has too few pairs"
    found = agreement(result(few, few | {"id": "b"}), result(few, few | {"id": "b"}))
    assert (found.rows, found.too_few) == (0, 2) and str(found).endswith("; 2 rows have too few pairs")
    assert "too few" not in str(agreement(result(enough), result(enough)))


def test_the_report_of_two_results_says_it(tmp_path, capsys):
    committed = min(readme_table.COMMITTED.glob("all_*.json"))
    first = json.loads(committed.read_text())
    second = copy.deepcopy(first)
    moved = next(r for r in second["rows"] if "ratio" in r)
    moved["ratio"] |= {"low": 90.0, "median": 91.0, "high": 92.0}
    other = tmp_path / "second.json"
    other.write_text(json.dumps(second))
    assert html_page.main([committed, other], tmp_path / "page.html", False) == 0
    printed = capsys.readouterr().out
    total = sum("ratio" in r for r in first["rows"])
    assert moved["id"].split(" / ")[0][:20] in printed
    for text in (printed, (tmp_path / "page.html").read_text()):
        assert f"overlap in {total - 1} of {total} rows" in text
    second["machine"]["name"] = "another machine"
    other.write_text(json.dumps(second))
    assert html_page.main([committed, other], tmp_path / "page.html", False) == 0
    for text in (capsys.readouterr().out, (tmp_path / "page.html").read_text()):
        assert "overlap" not in text
