"""How fast are beam searches, and how much of the time from features to text do they take?

`python -m bench decode` measures our searches and flashlight-text on utterances of 16.7 s, in utterances per second.
The posteriors are confident or unsure. The language model is none, an n-gram of characters, or an n-gram of words. The
way from features to text is measured on one utterance of 7 s.
"""

import os

from jasper_fast.bench.cases import decode, latency
from jasper_fast.bench.harness.run import Run

BEAM = 128  # the beam that every run measures


def main(run: Run, model: str) -> list[dict]:
    """Measures the search of one utterance for each kind of posteriors, beam and language model. On a machine with
    several cores, it then measures the search of several utterances on all cores. At the end it measures the acoustic
    model together with the search.
    """
    beams = (BEAM,) if run.quick else (16, BEAM, 512)
    cores = os.cpu_count() or 1
    shared = latency.Models(run, model)
    cases = [decode.search_case(kind, beam, lm) for lm in decode.LMS for kind in decode.SHARP for beam in beams]
    if cores > 1:
        cases += [decode.search_case("unsure", BEAM, lm, 2 * cores, cores) for lm in decode.LMS]
    cases += [decode.whole_case(shared, run, model, 7.0, BEAM, lm) for lm in decode.LMS]
    found = run.cases("decode", cases)
    run.close(shared.close)
    return found
