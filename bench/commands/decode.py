"""How fast are beam searches, and how much of the time from sound to text do they take?

`python -m bench decode`; utterances of 16.7 s per second, beside flashlight-text, on confident and unsure posteriors.
"""

from jasper_fast.bench.cases import decode, latency
from jasper_fast.bench.harness.run import Run

BEAMS = (16, 128, 512)
GOAL = 128  # the beam of the goals


def main(run: Run, model: str) -> list[dict]:
    """Searches alone, by posteriors, beam and language model; then behind the acoustic model."""
    found = []
    for fused in (False, True):
        for kind in decode.SHARP:
            beams = (GOAL,) if run.quick else BEAMS
            found += run.cases("decode", [decode.search_case(kind, beam, fused) for beam in beams])
    shared = latency.Models(run, model)
    try:
        found += run.cases("decode", [decode.whole_case(shared, run, model, 7.0, GOAL)])
    finally:
        run.close(shared.close)
    return found
