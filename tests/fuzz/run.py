"""Runs many random cases of one kind, one of KINDS: python tests/fuzz/run.py KIND --cases 2000 --seed 1.

Case i has the seed SEED + i. For every failing case the program prints the seed, the error and a command that runs only
that case. The exit status is 1 if any case failed.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

# The number of cases that test_fuzz.py runs, by kind
KINDS = {"models": 24, "manifests": 300, "audio": 200, "checkpoints": 150, "corpora": 60}


def failures(kind: str, cases: int, seed: int) -> list[str]:
    """Returns a text for each failing case of `kind`: the error, and the command that runs the case again."""
    import hostile
    import models
    import spoiled

    case = {"models": models.case, "corpora": spoiled.case}.get(kind) or getattr(hostile, kind)
    found = []
    for i in range(seed, seed + cases):
        try:
            case(i)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".replace("\n", " ")
            found.append(f"seed {i}: {text}\n  python tests/fuzz/run.py {kind} --cases 1 --seed {i}")
            print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="run random cases; case i has the seed SEED + i")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    failed = failures(args.kind, args.cases, args.seed)
    print(f"{args.kind}: {args.cases} cases from seed {args.seed}, {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
