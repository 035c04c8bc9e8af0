"""Compares two runs on one machine: counts the rows whose 95 % intervals of the ratio overlap in the two runs."""

from dataclasses import dataclass

from jasper_fast.bench.report import words


@dataclass(frozen=True)
class Agreement:
    """How far two results agree.

    `rows`: the number of rows that have an interval in both results. `apart`: the ids of the rows whose two intervals
    do not overlap. `too_few`: the number of common rows that have too few pairs for an interval in at least one result.
    """

    rows: int
    apart: tuple[str, ...]
    too_few: int = 0

    def __str__(self) -> str:
        text = "no row with an interval is in both results"
        if self.rows:
            same = self.rows - len(self.apart)
            text = f"intervals of the ratios overlap in {same} of {self.rows} rows ({100 * same / self.rows:.0f} %)"
        if self.too_few:
            text += f"; {self.too_few} row{'s have' if self.too_few > 1 else ' has'} too few pairs"
        return text


def agreement(first: dict, second: dict) -> Agreement:
    """Compares the rows that both results measured."""
    ones, others = _ratios(first), _ratios(second)
    both = {key: (ones[key], others[key]) for key in ones if key in others}
    known = {key: pair for key, pair in both.items() if all(map(words.known, pair))}
    apart = (key for key, (a, b) in known.items() if a["low"] > b["high"] or b["low"] > a["high"])
    return Agreement(len(known), tuple(apart), len(both) - len(known))


def _ratios(result: dict) -> dict[str, dict]:
    return {row["id"]: row["ratio"] for row in result["rows"] if row["status"] == "ok" and "ratio" in row}
