"""The folder of the checkout, if there is one, and the folder in which runs write their files."""

from pathlib import Path

BENCH = Path(__file__).resolve().parents[1]
CHECKOUT = BENCH.parent if (BENCH.parent / "pyproject.toml").is_file() else None  # None in an installed package
BUILD = (CHECKOUT or Path.cwd()) / "build"
OUT = BUILD / "bench"
COMMAND = "python -m bench" if CHECKOUT else "python -m jasper_fast.bench"


def checkout(what: str) -> Path:
    """Returns the folder of the checkout. If there is none, raises SystemExit with the message that `what` needs
    one."""
    if CHECKOUT is None:
        raise SystemExit(f"{what} needs a checkout of the repository, but this is an installed package")
    return CHECKOUT
