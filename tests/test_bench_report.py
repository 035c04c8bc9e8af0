"""The HTML page, the terminal and the README's table show what a result's JSON says."""

import copy
import itertools
import json
import re
import shutil
from html import unescape

import pytest
from bench_runs import RATIO, SAMPLES, row

from jasper_fast.bench.harness import paths, ratios
from jasper_fast.bench.report import html_page, published, readme_table, svg, terminal, words
from jasper_fast.bench.report.agreement import agreement

LIMITS = {
    "matmul_flops_per_s": {"float16": 8e14, "float32": 4e14, "float32 in IEEE": 5e13, "float32 in TF32": 4e14},
    "float32_mode": "TF32",
    "copy_bytes_per_s": 2.5e12,
    "launch_s": {"host": 2e-6},
    "clocks": {"sm_mhz": 1755, "temperature_c": 61},
}

SCALING = {
    "processes": 8, "efficiency": 0.9375, "silent_s": 0.0146, "exposed_s": 3.3e-4, "pairs": 100,
    "exposed_low_s": 3e-4, "exposed_high_s": 4e-4,
}  # fmt: skip


def full(name: str = "NVIDIA Imaginary 9000") -> dict:
    """Returns a result of `python -m bench gpu` with an example of every part."""
    utterance = {"model": "jasper10x5", "N": 4, "seconds": 7.0, "dtype": "float16", "path": "acoustic model"}
    step = {"model": "jasper10x5", "batch": "(32, 64, 1680)", "dtype": "float16", "mode": "step"}
    conv = {"op": "conv1d", "shape": "(32, 256->256, 832)", "taps": "K = 11", "dtype": "float16", "mode": "both"}
    tiny = {"model": "small", "N": 1, "seconds": 0.32, "dtype": "float16", "path": "acoustic model"}
    above = {
        "limit": {"bound": "compute", "floor_s": 1.0, "share": 1.25}, "flops_per_s": 1e15, "flops": 1e12, "bytes": 1e9,
    }  # fmt: skip
    rows = [
        *(row("kernels", c, conv, **above) for c in ("jasper_fast", "eager", "cudnn")),
        *(row("train", c, step, items_per_s=1234.5) for c in ("jasper_fast", "eager", "compile")),
        row("train", "jasper_fast", step | {"processes": 8}, items_per_s=3141.5, scaling=SCALING),
        *(row("latency", c, utterance, items_per_s=777.0, host_s=123e-6)
          for c in ("jasper_fast", "eager", "cuda_graph")),
        *(row("launches", c, tiny, launches={"ops": 321, "kernels": 54, "host_launches": 3})
          for c in ("jasper_fast", "eager")),
        *(row("memory", c, step, memory={"kept_bytes": 10 * 2**20, "peak_bytes": 30 * 2**20})
          for c in ("jasper_fast", "eager")),
        row("latency", "tensorrt", utterance, status="absent", why="torch_tensorrt is <not> installed"),
    ]  # fmt: skip
    profiled = {"model": "small", "mode": "train", "batch": [8, 400]}
    records = [
        {"kind": kind, "name": name, "seconds": 0.1, "calls": 5}
        for kind, name in (("layer", "encoder.layers.3"), ("backward", "encoder.layers.4"), ("op", "aten::<conv>"))
    ]
    tuned = {
        "op": "conv1d.fused", "c_in": 256, "c_out": 384, "taps": 13, "stride": 1, "dilation": 2, "rows_log2": 12,
        "dtype": "float16", "face": "triton", "tile": {"t": 128, "n": 64}, "time_s": 41e-6,
    }  # fmt: skip
    about = {
        "name": name, "device": "cuda", "cpu": {"name": "c", "cores": 16, "isa": ["avx2"]}, "threads": 16,
        "gpu": {"capability": "sm_90", "memory_gib": 79.6, "driver": "1.2",
                "clocks_at_start": {"sm_mhz": 345, "temperature_c": 33}},
        "load_average": [0.5, 0.5, 0.5], "python": "3.11", "packages": {"torch": "2.13.0"}, "cuda": "13.0",
        "commit": "0123456789", "dirty": False, "date": "2026-01-01T00:00:00+00:00", "command": "python -m bench gpu",
    }  # fmt: skip
    return {
        "schema": 1, "machine": about, "limits": copy.deepcopy(LIMITS), "rows": rows, "goals": [], "finished": True,
        "arguments": {"quick": "False"}, "table": {"rows": [tuned]},
        "profiles": [
            profiled | {"contender": "jasper_fast", "step_s": 0.5, "profiled_s": 0.6, "records": records},
            profiled | {"contender": "eager", "status": "wrong", "why": "NaN"},
        ],
        "parts": {"self-check": "finished", "latency grid": "cut off"},
        "selfcheck": {
            "seconds": 3.0, "failures": ["conv1d.forward is off by 2"],
            "verdicts": [{"op": "conv1d.forward", "face": "triton", "status": "bad", "quick": True, "checked": 41}],
        },
    }  # fmt: skip


def section(html: str, title: str) -> str:
    """Returns the part of a page below this heading, up to the next one of the same level."""
    _, _, rest = html.partition(f"<h2>{title}")
    assert rest, title
    return rest.partition("<h2>")[0]


def cells(html: str) -> list[list[str]]:
    """Returns the rows of the tables in `html` as lists of cells without markup."""
    return [
        [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", line)]
        for line in re.findall(r"<tr.*?</tr>", html)
    ]


def forms(html: str) -> tuple[str, str]:
    """Returns the plot in `html` in its two forms, for a wide page and for a phone."""
    return tuple(re.search(f'<div class="{cls}">(.*?)</div>', html, re.S)[1] for cls in ("broad", "slim"))


def line_of(html: str, start: str) -> list[str]:
    """Returns the cells of the first row of a table in `html` whose first cell begins with `start`."""
    return next(line for line in cells(html) if line[0].startswith(start))


@pytest.fixture(scope="module")
def page() -> str:
    return html_page.page([full()])


# ------------------------------------------------------------------ rows and bars


def test_rows_have_the_columns_of_their_subcommand(page):
    every = section(page, "Every timed row")
    found = cells(every)
    assert found[0][2:5] == ["median", "p20 to p80", "p99"] and "utterances/s" not in found[0]
    train, waited = (found.index(line_of(every, start)) for start in ("jasper10x5, (32", "jasper10x5, N = 4"))
    assert found[train - 1][2:6] == ["median", "p20 to p80", "p99", "utterances/s"] and found[train][5] == "1,234"
    assert found[waited - 1][2:9] == ["mean", "P50", "P90", "P95", "P99", "host", "utterances/s"]
    t = ratios.summary(SAMPLES, 1)
    times = [words.duration(t[k]) for k in ("mean", "p50", "p90", "p95", "p99")]
    assert found[waited][2:9] == [*times, "123 us", "777"]


def test_the_terminal_shows_the_same_columns(capsys):
    terminal.show(full()["rows"], [])
    printed = capsys.readouterr().out
    texts = ["P50", "P90", "P95", "P99", "mean", "utterances/s", "host launches", "125 %* (compute)", "321"]
    assert not [text for text in (*texts, words.FOOTNOTE[:40]) if text not in printed]


def test_every_rival_that_has_a_time_has_a_bar(page):
    rivals = {"Kernels": ["cudnn"], "Training step": ["compile"], "Inference": ["cuda_graph"], "Launches": []}
    for title, others in rivals.items():
        for plot in forms(section(page, f"{title}: ")):
            assert plot.count("<rect") == 1 + len(others)
            assert all(f">{name}</text>" in plot for name in ["eager", *others])


@pytest.mark.slow
def test_a_share_above_the_limit_is_explained(page):
    assert "125 %* (compute)" in page and page.count("More than 100 % is possible") == 1
    modest = full()
    for r in modest["rows"]:
        r.pop("limit", None)
    assert "More than 100 %" not in html_page.page([modest])


# ------------------------------------------------------------------ a phone


def overhanging(plot: str, font: int) -> list[str]:
    """Returns the texts that do not fit into their plot, if a character is 0.6 of the font size wide."""
    width, found = float(re.search(r'viewBox="0 0 (\d+)', plot)[1]), []
    for anchor, x, told in re.findall(r'<text class="[^"]*" text-anchor="(\w+)" x="([\d.]+)"[^>]*>(.*?)</text>', plot):
        wide = 0.6 * font * len(unescape(told))
        left = float(x) - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
        if left < -1 or left + wide > width + 1:
            found.append(told)
    return found


def test_no_text_of_a_plot_leaves_it():
    result = full()
    for r in result["rows"]:  # use the longest names, the shortest and the longest times, and long bars
        if r["bench"] == "kernels":
            r["key"] = {
                "op": "bn_relu_dropout+residual",
                "shape": "(32, 1024->1024, 832)",
                "taps": "K = 29 s = 2 d = 2",
            }
        if r["contender"] == "cudnn":
            r["contender"], r["ratio"] = "compile_max_autotune", RATIO | {"median": 1234.5, "high": 2345.6}
        if r["contender"] == "cuda_graph":
            r["contender"] = "eager_2d_channels_last"
            r["time_s"] = ratios.summary([1e-3 * i * i for i in range(100)], 1)
    html = html_page.page([result])
    for title in ("Kernels: ", "Training step: ", "Inference: ", "Latency, P50", "How far from"):
        for form, plot in zip((svg.WIDE, svg.NARROW), forms(section(html, title)), strict=True):
            assert f'viewBox="0 0 {form.width} ' in plot and not overhanging(plot, form.font), title
    assert len(svg.NARROW.lines(html_page.label(result["rows"][0]))) > 1


def test_the_form_that_a_page_of_any_width_shows_can_be_read():
    css = html_page.STYLE.read_text()
    turn = int(
        re.search(r"max-width: (\d+)px\) \{\s*\.broad \{ display: none \}\s*\.slim \{ display: block \}", css)[1]
    )
    fonts = [
        int(re.search(rf"^{of} \{{[^}}]*?(\d+)px(?: system-ui| \}})", css, re.M)[1]) for of in ("svg", r"\.slim svg")
    ]
    assert fonts == [svg.WIDE.font, svg.NARROW.font] and re.search(r"^\.slim \{ display: none \}", css, re.M)
    margins = 2 * int(re.search(r"^main \{.*padding: 20px (\d+)px", css, re.M)[1])
    for form, narrowest in ((svg.WIDE, turn + 1), (svg.NARROW, 320)):
        assert form.font * min(1.0, (narrowest - margins) / form.width) >= 11
    rules = re.findall(r"^(?:\.slim |\.broad )?svg \{.*\}|^\.(?:slim|broad) \{.*\}", css, re.M)
    assert len(rules) == 3 and not any("min-width" in rule or "overflow" in rule for rule in rules)


# ------------------------------------------------------------------ parts of a run on a GPU


@pytest.mark.parametrize(("title", "texts"), [
    ("Launches of one call",
     ["<th>ops</th><th>kernels</th><th>host launches</th>", "<td>321</td><td>54</td><td>3</td>"]),
    ("Where the time goes",
     ["encoder.layers.3", "encoder.layers.4", "500 ms without the profiler, 600 ms with it", "NaN"]),
    ("Self-check", ["conv1d.forward is off by 2", "<td>41</td>"]),
    ("Tuning", ["256 to 384, K = 13, dilation 2", "t 128, n 64"]),
    ("Parts of the run", ["<td>latency grid</td>", ">cut off</td>"]),
    ("Training over processes", ["3,142", "94 %", "330 us, 2.2 [2.0, 2.7] %", "32 each: 470.1 (91 %)"]),
    ("", ["SM 345 MHz, 33 °C", "SM 1755 MHz, 61 °C", "the rate in TF32", "float16 800 TFLOP/s",
          "copy 2.5 TB/s; launch 2 us"]),
])  # fmt: skip
def test_each_part_of_a_run_is_on_the_page(page, title, texts):
    assert not [text for text in texts if text not in (section(page, title) if title else page)]


@pytest.mark.parametrize(
    ("clocks", "told"),
    [
        ({"cpu_mhz": [2600, 2700], "temperature_c": 55.4}, "2600, 2700 MHz; 55 °C"),
        ({"cpu_mhz": [2445]}, "2445 MHz"),
        (
            {"sm_mhz": 1755, "memory_mhz": 2619, "temperature_c": 61, "power_w": 412.3, "held_by": ["power"]},
            "SM 1755 MHz, memory 2619 MHz, 61 °C, 412 W, held by power",
        ),
    ],
)
def test_clocks_are_told_in_words(clocks, told):
    assert html_page.state(clocks) == told


def test_a_comparison_has_ratios_and_memory():
    second = full()
    for r in second["rows"]:
        if "memory" in r:
            r["memory"] = {"kept_bytes": 5 * 2**20, "peak_bytes": 60 * 2**20}
    lines = cells(section(html_page.page([full(), second]), "Comparison"))
    case = "memory: jasper10x5, (32, 64, 1680), float16, step"
    assert [case, "eager", "10.0 / 30.0", "5.0 (0.500) / 60.0 (2.000)"] in lines
    eager = next(line for line in lines if line[0].startswith("train") and line[1] == "eager")
    assert "1.50 [1.40, 1.60]" in eager[2] and "(1.00x)" in eager[3]


# ------------------------------------------------------------------ published numbers


def test_published_tables_are_whole():
    gpus = ["A100 80GB", "V100 16GB (DGX-1)", "V100 32GB (DGX-1)", "V100 32GB (DGX-2)", "T4"]
    sizes = set(itertools.product((1, 2, 4, 8, 16), (2.0, 7.0, 16.7)))
    for table in (published.LATENCY_FP16, published.LATENCY_FP32):
        assert list(table) == gpus and all(set(found) == sizes for found in table.values())
        for mean, *percentiles in (times for found in table.values() for times in found.values()):
            assert mean <= percentiles[0] * 1.1 and percentiles == sorted(percentiles)
    assert len(published.TRAINING) == 23 and {row[2] for row in published.TRAINING} == {1, 4, 8, 16}
    one_gpu = {row[:2]: row[4] for row in published.TRAINING if row[2] == 1}
    for gpu, batch, count, full_rate, amp in published.TRAINING:
        assert 0.75 <= amp / (count * one_gpu[gpu, batch]) <= 1  # efficiency
        assert full_rate is None or 1.4 < amp / full_rate < 2.95
    # spot checks of each table
    assert published.latency("float32")["V100 16GB (DGX-1)"][8, 7.0] == (129.82, 130.65, 131.09, 132.91)
    assert published.latency("bfloat16")["V100 32GB (DGX-2)"][16, 16.7] == (124.33, 125.57, 125.92, 128.78)
    assert ("V100 32GB (DGX-2)", 1, 43.86) in published.training(64, "float16")
    assert [gpu for gpu, gpus, _ in published.training(64, "float32") if gpus == 1] == ["A100 80GB"]


def test_our_rows_stand_beside_the_published_ones_of_their_batch_and_length(page):
    beside = section(page, "Beside other hardware")
    line = line_of(beside, "N = 4, 7.0 s")
    mean = f"{1e3 * ratios.summary(SAMPLES, 1)['mean']:.1f} / "  # in ms
    assert line[1].startswith(mean) and line[2].startswith(mean)
    assert line[3:] == ["34.1 / 34.3 / 34.6 / 35.4", "50.4 / 51.8 / 52.0 / 54.4", "52.1 / 53.1 / 53.6 / 55.7",
                        "38.0 / 38.5 / 39.0 / 42.5", "49.9 / 52.2 / 52.9 / 54.2"]  # fmt: skip
    heads = line_of(beside, "batch, length")
    assert all(h.endswith("published") for h in heads[3:]) and "NVIDIA Imaginary 9000" in heads[1]
    train = line_of(beside, "N = 32, 1680 frames, float16")
    assert train[1:3] == ["1234.5", "1234.5"] and "A100 80GB 64.3; V100 32GB (DGX-1) 34.1" in train[3]
    assert "not measured here" in beside


def test_a_result_without_jasper_10x5_has_no_such_table():
    result = full()
    result["rows"] = [r for r in result["rows"] if r["key"].get("model") != "jasper10x5"]
    html = html_page.page([result])
    assert "Beside other hardware" not in html and "Not measured here" in html
    key = {"model": "jasper10x5", "N": 3, "seconds": 2.0, "dtype": "float16", "path": "acoustic model"}
    result["rows"].append(row("latency", "jasper_fast", key))
    assert "Beside other hardware" not in html_page.page([result]), "nothing was published for N = 3"


# ------------------------------------------------------------------ README


def test_the_readme_s_table_is_what_the_committed_results_say(tmp_path):
    committed = paths.CHECKOUT / "README.md"
    copied = shutil.copy(committed, tmp_path / "README.md")
    results = map(html_page.load, sorted(readme_table.COMMITTED.glob("*.json")))
    assert readme_table.write(results, copied) == 0
    assert copied.read_text() == committed.read_text(), "run: python -m bench report --readme"


@pytest.mark.parametrize("readme", ["README.md", "bench/README.md"])
def test_what_the_readmes_say_of_two_runs_is_what_the_two_runs_say(readme):
    text = (paths.CHECKOUT / readme).read_text()
    first, second = sorted(set(re.findall(r"all_\w[\w-]+\.json", text)))
    found = agreement(html_page.load(readme_table.COMMITTED / first), html_page.load(readme_table.COMMITTED / second))
    assert f"overlap in {found.rows - len(found.apart)} of {found.rows} rows" in text


@pytest.mark.parametrize("readme", ["README.md", "bench/README.md"])
def test_links_of_the_readmes_lead_somewhere(readme):
    path = paths.CHECKOUT / readme
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text())
    assert links and not [link for link in links if not (path.parent / link).exists()]


def test_the_readme_takes_the_newest_result_in_full_before_any_quick_one():
    def result(date: str, quick: bool, *names: str) -> dict:
        return {
            "machine": {"date": date}, "arguments": {"quick": str(quick)},
            "goals": [{"name": name, "by": date} for name in names],
        }  # fmt: skip

    results = [
        result("1", False, "a", "b", "c"),
        result("2", False, "a", "b"),
        result("3", True, "a", "d"),
        result("4", True, "d"),
    ]
    chosen = readme_table.chosen_goals(results)
    assert {goal["name"]: by["machine"]["date"] for goal, by in chosen} == {"a": "2", "b": "2", "c": "1", "d": "4"}


def test_a_source_says_the_load_and_not_where_the_file_was_put(tmp_path):
    result = full() | {"path": tmp_path / "r.json"}
    result["machine"]["command"] = "python -m bench all --out some/where --threads 2"
    source = readme_table.source(result)
    assert source.startswith("`python -m bench all --threads 2`") and "load average 0.5 before the run" in source
    assert source.endswith("; r.json")


def test_the_newest_result_is_no_trace_and_has_rows(tmp_path):
    for name in ("kernels_a.json", "trace_small_train_eager_1.json", "data_a.json"):
        (tmp_path / name).write_text(json.dumps({}))
    assert html_page.newest(tmp_path) == [tmp_path / "kernels_a.json"]
    assert html_page.newest(tmp_path / "none") == []


def test_no_number_is_told_with_an_exponent():
    assert [words.duration(s) for s in (0.9997, 0.99949, 1.0, 1234.5)] == ["1,000 ms", "999 ms", "1 s", "1,234 s"]
    assert words.per_second(1.2e15, "FLOP") == "1,200 TFLOP/s" and words.per_second(4.56e11, "B") == "456 GB/s"
    [*_, told] = svg.roofline([("a", 100.0, 5e14, True)], 9e14, 4e12, svg.WIDE)["dots"][0]
    assert told == "a: 500 TFLOP/s"
    slow = row("latency", "eager", {"N": 16}, time_s=ratios.summary([12.3456] * 20, 1))
    [[entry]] = html_page.percentiles_of([slow]).values()
    assert entry[3:] == ("P50 12346 ms, P90 12346 ms, P95 12346 ms", "12346 ms")


def test_brackets_in_the_name_of_a_file_are_told(capsys):
    terminal.show([row("train", "eager", {"model": "nets[/v2]/[b]/net.yaml"}, status="absent", why="[why]")], [])
    out = capsys.readouterr().out
    assert out.count("nets[/v2]/[b]/net.yaml") == 2 and "[why]" in out


# ------------------------------------------------------------------ too few samples


def of(samples: int, pairs: int) -> dict:
    """Returns the result of `full` with only this many samples and pairs."""
    result = full()
    for r in result["rows"]:
        if "time_s" in r:
            r["time_s"] = ratios.summary(SAMPLES[:samples], 1)
        if "ratio" in r:
            r["ratio"] = RATIO | {"pairs": pairs}
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "told"), [(9, 0), (10, 1), (19, 1), (20, 2), (99, 2), (100, 3)])
def test_a_percentile_is_told_only_where_it_is_not_the_extreme(samples, told, capsys):
    result = of(samples, 100)
    html = html_page.page([result])
    ours = line_of(section(html, "Every timed row"), "jasper10x5, N = 4")
    t = ratios.summary(SAMPLES[:samples], 1)
    wanted = [words.duration(t[p]) for p in ("p90", "p95", "p99")[:told]] + [words.DASH] * (3 - told)
    assert ours[2:7] == [words.duration(t["mean"]), words.duration(t["p50"]), *wanted]
    for plot in forms(section(html, "Latency, P50 to P99")):
        assert plot.count("<circle") == 3 * (1 + told) and bool(re.search(r"P99 \S+ ms", plot)) == (told == 3)
    assert line_of(section(html, "Beside other hardware"), "N = 4, 7.0 s")[1].count(words.DASH) == 3 - told
    terminal.show(result["rows"], [])
    printed = capsys.readouterr().out
    assert (words.FEW[:40] in printed) == (words.FEW in section(html, "Every")) == (told < 3)


def test_quantiles_that_a_result_leaves_out_are_dashes():
    result = of(100, 100)
    for r in result["rows"]:
        r.get("time_s", {}).pop("p99", None)
    html = html_page.page([result])
    assert words.FEW in html and not re.search(r"P99 \S+ ms", section(html, "Latency, P50 to P99"))


@pytest.mark.parametrize(("pairs", "told"), [(5, False), (6, True)])
def test_a_ratio_of_few_pairs_has_no_interval(pairs, told, tmp_path, capsys):
    result = of(100, pairs)
    goal = {
        "name": "g", "goal": 1.0, "at_most": False, "met": True, "measured": 1.5, "low": 1.4, "high": 1.6,
        "kind": "ratio", "row": next(r["id"] for r in result["rows"] if r["contender"] == "eager"),
    }  # fmt: skip
    result["goals"], result["path"] = [goal], tmp_path / "r.json"
    terminal.show(result["rows"], result["goals"])
    html, readme = html_page.page([result]), readme_table.table([result])
    for text, interval, few in (
        (capsys.readouterr().out, "1.50 [1.40, 1.60]", f"1.50 of {pairs} pairs"),
        (section(html, "Every timed row"), "1.50 [1.40, 1.60]", f"1.50 of {pairs} pairs"),
        (section(html, "Goals"), "1.500 [1.400, 1.600]", f"1.500 of {pairs} pairs"),
        (section(html_page.page([result, result]), "Comparison"), "1.50 [1.40, 1.60]", f"1.50 of {pairs} pairs"),
        (readme, f"1.50x [1.40, 1.60] of {pairs} pairs", f"1.50x of {pairs} pairs"),
    ):
        assert (interval in text, few in text) == (told, not told)
    assert ('class="whisker"' in html) == told


def test_a_row_of_few_rounds_is_marked_on_the_page_and_in_the_terminal(page, capsys):
    result = full()
    assert "†" not in page and "‡" not in page
    for r in result["rows"]:
        r["hurried"] = r["ours"]
    result["rows"][0]["throttled"] = True
    html = section(html_page.page([result]), "Every timed row")
    assert html.count(" †</td>") == 5
    assert html.count(" ‡ †</td>") == html.count(words.HURRIED) == html.count(words.SLOWED) == 1
    terminal.show(result["rows"], [])
    printed = capsys.readouterr().out
    assert words.HURRIED in printed and words.SLOWED in printed


def test_steps_over_processes_stand_beside_as_many_published_gpus():
    assert [found[2:] for found in published.scaling(8, "float32") if found[:2] == ("A100 80GB", 64)] == [
        (371.41, pytest.approx(371.41 / 8 / 49.64))
    ]
    assert words.scaling_lines([row("train", "eager", {"mode": "step"}, items_per_s=1.0)]) == []
