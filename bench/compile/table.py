"""The table of a compile gate: that of the Triton kernels or that of the CUDA kernels.

The rows are printed and compared with the committed table. `--update` writes them to that table, and `--out` to
another file.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from jasper_fast.bench.harness import paths
from jasper_fast.bench.harness.machine import commit

COMMITTED = paths.BENCH / "compiled"


@dataclass(frozen=True)
class Table:
    """The fields of one compiler's rows, and how the rows are named, printed and sorted.

    `key`: the fields that identify a row. `name`: the format of a row's name in messages. `facts`: the fields that the
    gate measures; the file leaves out those that are 0. `shown`: the facts that are printed, with their headings.
    `order`: the sort key of a row's key.
    """

    compiler: str
    key: tuple[str, ...]
    name: str
    facts: tuple[str, ...]
    shown: dict[str, str]
    order: Callable[[tuple], tuple]

    def label(self, key: tuple) -> str:
        """Returns a row's name for messages."""
        return self.name.format(*key)

    def by_key(self, rows: Iterable[dict]) -> dict[tuple, dict]:
        """Returns the rows by their keys."""
        return {tuple(row[k] for k in self.key): row for row in rows}

    def read(self, text: str) -> dict[tuple, dict]:
        """Returns the rows of a file by their keys. Facts that the file leaves out are 0."""
        return self.by_key(dict.fromkeys((*self.key, *self.facts), 0) | row for row in json.loads(text)["rows"])

    def text(self, version: str, rows: dict[tuple, dict]) -> str:
        """Returns the sorted table as JSON with one line per row, so that diffs are readable."""
        kept = ({k: v for k, v in rows[key].items() if v != 0} for key in sorted(rows, key=self.order))
        lines = ",\n".join(map(json.dumps, kept))
        return f'{{"{self.compiler.lower()}": {json.dumps(version)}, "rows": [\n{lines}\n]}}\n'

    def differences(self, committed: dict[tuple, dict], found: dict[tuple, dict]) -> list[str]:
        """Returns a line for each row that is new, gone, or changed (with the old and new values)."""
        lines = []
        for key, row in found.items():
            old = committed.get(key)
            if old is None:
                lines.append(f"{self.label(key)}: new, not in the committed table")
            elif changed := [f"{k} {old[k]} -> {row[k]}" for k in self.facts if old[k] != row[k]]:
                lines.append(f"{self.label(key)}: {', '.join(changed)}")
        gone = (key for key in committed if key not in found)
        return lines + [f"{self.label(key)}: in the committed table, but no longer compiled" for key in gone]

    def show(self, rows: dict[tuple, dict]) -> None:
        """Prints every row with its facts, as an aligned table."""
        names = list(map(self.label, rows))
        wide, column = max(map(len, names), default=0), max(map(len, self.shown.values()))
        print(" ".join([" " * wide, *(f"{heading:>{column}}" for heading in self.shown.values())]))
        for name, row in zip(names, rows.values(), strict=True):
            print(" ".join([f"{name:<{wide}}", *(f"{row[fact]:>{column}}" for fact in self.shown)]))

    def judge(
        self,
        args: argparse.Namespace,
        version: str,
        found: dict[tuple, dict],
        broken: Sequence[str],
        asked: Callable[[tuple], bool],
        seconds: float,
    ) -> int:
        """Prints the rows, the broken rules and the differences from the table; returns the exit status.

        The exit status is 1 if a rule is broken or, without --update, if the table differs or does not exist.

        With --update it writes the table, and with --out a file of the rows, except if there is no table to compare
        with and no --update. It compares and replaces only rows whose key `asked` accepts.
        """
        compiler = f"{self.compiler} {version}"
        file = f"{self.compiler.lower()}-{version}.json"
        table = args.table or COMMITTED / file
        self.show(found)
        for line in broken:
            print(f"FAILED {line}")
        if not table.exists() and not args.update:
            print(f"FAILED there is no table for {compiler} at {table}; make it with --update and commit it")
            return 1
        old = self.read(table.read_text()) if table.exists() else {}
        changes = self.differences({key: row for key, row in old.items() if asked(key)}, found)
        for line in changes:
            print(f"{'CHANGED' if args.update else 'DIFFERS'} {line}")
        if args.update:
            table.parent.mkdir(parents=True, exist_ok=True)
            table.write_text(self.text(version, {key: row for key, row in old.items() if not asked(key)} | found))
        elif changes:
            print(f"the results differ from {table.name}; if that is intended, run with --update and commit the table")
        if args.out is not None:
            path = args.out / f"compile_{file}"
            result = {
                "command": "compile" + " --cuda" * args.cuda, self.compiler.lower(): version, "commit": commit(),
                "broken": broken, "changes": changes, "rows": list(found.values()),
            }  # fmt: skip
            path.write_text(json.dumps(result, indent=1))
            print(f"wrote {path}")
        print(
            f"{compiler}: {len(found)} kernels in {seconds:.0f} s, {len(broken)} broken rules, {len(changes)} changes"
        )
        return 1 if broken or (changes and not args.update) else 0
