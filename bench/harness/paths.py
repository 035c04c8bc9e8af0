"""Where things lie: the checkout, if this is one, and the folder for what runs leave."""

from pathlib import Path

BENCH = Path(__file__).resolve().parents[1]
CHECKOUT = BENCH.parent if (BENCH.parent / "pyproject.toml").is_file() else None  # an installed package has none
BUILD = (CHECKOUT or Path.cwd()) / "build"
OUT = BUILD / "bench"
COMMAND = "python -m bench" if CHECKOUT else "python -m jasper_fast.bench"


def checkout(what: str) -> Path:
    """The checkout's folder; raises SystemExit where `what` asks for one and there is none."""
    if CHECKOUT is None:
        raise SystemExit(f"{what} needs a checkout of the repository: this is an installed package")
    return CHECKOUT
