"""Do two runs of one machine say the same? Rows whose 95 % intervals of the ratio to a rival overlap, and those not."""

from dataclasses import dataclass

from jasper_fast.bench.report import words


@dataclass(frozen=True)
class Agreement:
    """How many rows with an interval two results share, the ids of those whose intervals do not overlap, and how many
    shared rows have no interval, because one of the results has too few pairs for it."""

    rows: int
    apart: tuple[str, ...]
    too_few: int = 0

    @property
    def share(self) -> float:
        """The part of the rows that overlap; 0 where none is shared."""
        return (self.rows - len(self.apart)) / self.rows if self.rows else 0.0

    def __str__(self) -> str:
        told = f"intervals of the ratios overlap in {self.rows - len(self.apart)} of {self.rows} rows"
        told = f"{told} ({100 * self.share:.0f} %)" if self.rows else "no row with an interval is in both results"
        few = f"{self.too_few} row{'s have' if self.too_few > 1 else ' has'} too few pairs"
        return f"{told}; {few}" if self.too_few else told


def agreement(first: dict, second: dict) -> Agreement:
    """Compare the rows that both results measured, each with pairs enough for an interval."""
    ones, others = _ratios(first), _ratios(second)
    both = {key: (ones[key], others[key]) for key in ones if key in others}
    told = {key: pair for key, pair in both.items() if all(map(words.known, pair))}
    apart = tuple(key for key, (a, b) in told.items() if a["low"] > b["high"] or b["low"] > a["high"])
    return Agreement(len(told), apart, len(both) - len(told))


def _ratios(result: dict) -> dict[str, dict]:
    return {row["id"]: row["ratio"] for row in result["rows"] if row["status"] == "ok" and "ratio" in row}
