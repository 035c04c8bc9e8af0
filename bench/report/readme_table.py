"""Writes the table between two markers of the project's README, with the newest results of each machine."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from jasper_fast.bench.harness import paths
from jasper_fast.bench.report import terminal, words

BEGIN, END = "<!-- bench: made by python -m bench report --readme -->", "<!-- /bench -->"
COMMITTED = paths.BENCH / "results"


def write(results: Iterable[dict], readme: Path | None = None) -> int:
    """Writes one table per machine between the markers of `readme` (default: README.md of the checkout); returns the
    exit status."""
    readme = readme or paths.checkout("--readme") / "README.md"
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{readme.name}: the markers {BEGIN} and {END} are missing; put them where the table belongs")
    machines: dict[str, list[dict]] = {}
    for result in sorted(results, key=lambda r: r["machine"]["date"]):
        machines.setdefault(result["machine"]["name"], []).append(result)
    if not machines:
        raise SystemExit("there is no result in bench/results; put one there, or give JSON files as arguments")
    tables = "".join(map(table, machines.values()))
    readme.write_text(f"{text.partition(BEGIN)[0]}{BEGIN}\n{tables}{END}{text.partition(END)[2]}")
    terminal.console.print(f"wrote the table in {readme.name}")
    return 0


def chosen_goals(results: Sequence[dict]) -> list[tuple[dict, dict]]:
    """Returns (goal, result) for each goal that a result measured. The goals of newer results come first.

    The result is the newest one without --quick that measured the goal. If there is none, it is the newest one with
    --quick. `results` must be sorted by date.
    """
    order = dict.fromkeys(goal["name"] for result in reversed(results) for goal in result["goals"])
    # Quick results come first, so that full ones replace them.
    by_effort = sorted(results, key=lambda r: r.get("arguments", {}).get("quick") != "True")
    chosen = {goal["name"]: (goal, result) for result in by_effort for goal in result["goals"]}
    return [chosen[name] for name in order]


def table(results: Sequence[dict]) -> str:
    """Returns the table of one machine in Markdown: the measurement for each goal, and how to repeat it."""
    chosen = chosen_goals(results)
    lines = [
        f"| {results[-1]['machine']['name']} | eager PyTorch | jasper_fast | ratio [95 %] |",
        "|---|---:|---:|---:|",
    ]
    for goal, result in chosen:
        rows = {row["id"]: row for row in result["rows"]}
        pair = rows.get(goal["row"]), rows[goal["row"].rsplit(" / ", 1)[0] + " / jasper_fast"]
        if goal["measured"] is None:
            cells = ["no number", pair[1].get("why", ""), ""]
        elif goal["kind"] == "share":
            cells = [words.duration(r["time_s"]["median"]) if r and "time_s" in r else "" for r in pair]
            cells.append(f"{100 * goal['measured']:.0f} % of the limit")
        elif "memory" in pair[0]:
            cells = [f"{r['memory']['kept_bytes'] / 2**20:,.0f} MiB" for r in pair]
            cells.append(f"{goal['measured']:.2f} of eager's")
        else:
            cells = [words.duration(r["time_s"]["median"]) for r in pair]
            cells[0] += "" if pair[0]["contender"] == "eager" else f" ({pair[0]['contender']})"
            ratio = pair[0]["ratio"]
            interval = f" [{goal['low']:.2f}, {goal['high']:.2f}]" if words.known(ratio) else ""
            pairs = f" of {ratio['pairs']} pairs" if "pairs" in ratio else ""
            cells.append(f"{goal['measured']:.2f}x{interval}{pairs}")
        lines.append(f"| {goal['name']} | {' | '.join(cells)} |")
    sources = (f"- {source(r)}" for r in results if any(result is r for _, result in chosen))
    return "\n".join([*lines, "", *sources, ""])


def source(result: dict) -> str:
    """Returns as text how a result was made (threads, torch, commit, load, command without --out), and its file."""
    m, path = result["machine"], result["path"]
    file = f"[result](bench/results/{path.name})" if path.parent == COMMITTED else path.name
    command = re.sub(r" --out \S+", "", m["command"])
    load = f", load average {m['load_average'][0]:.1f} before the run" if m.get("load_average") else ""
    return (
        f"`{command}`; {m['threads']} thread{'s' * (m['threads'] != 1)}, torch {m['packages']['torch']}, commit "
        f"{m['commit']}{load}; {file}"
    )
