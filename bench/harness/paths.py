"""Folders: the checkout, if there is one, and the folder for the files that runs write."""

from pathlib import Path

BENCH = Path(__file__).resolve().parents[1]
CHECKOUT = BENCH.parent if (BENCH.parent / "pyproject.toml").is_file() else None  # None in an installed package
BUILD = (CHECKOUT or Path.cwd()) / "build"
OUT = BUILD / "bench"
COMMAND = "python -m bench" if CHECKOUT else "python -m jasper_fast.bench"


def checkout(what: str) -> Path:
    """The folder of the checkout; if there is none, raises SystemExit saying that `what` needs one."""
    if CHECKOUT is None:
        raise SystemExit(f"{what} needs a checkout of the repository: this is an installed package")
    return CHECKOUT
