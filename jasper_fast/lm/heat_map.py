"""The page that `lm tune` writes: a heat map of word error rates over alpha and beta, in one HTML file."""

from collections.abc import Sequence
from html import escape

from jasper_fast.lm.tune import Trial, best
from jasper_fast.speech.metrics import Errors

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
 :root {{ color-scheme: light dark }}
 body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
 .wide {{ overflow-x: auto }}
 table {{ border-collapse: collapse }} th, td {{ padding: .3rem .6rem; text-align: right }}
 td.cell {{ color: #111 }} td.best {{ outline: 3px solid #111; font-weight: bold }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<div class="wide">{table}</div>
<p>Word error rates in %. Each cell is one pair of weights. Green is low, and the best cell is framed.</p>
</html>
"""


def page(found: Sequence[Trial], without: Errors, about: str) -> str:
    """Returns the HTML page of the trials ``found``. ``without``: the errors of greedy decoding.
    ``about``: a description of the run."""
    chosen, pairs = best(found), {}
    for trial in found:
        pairs.setdefault((trial.alpha, trial.beta), []).append(trial)
    found = [best(of) for of in pairs.values()]  # each pair with its best rescoring weight
    second = f", rescoring {chosen.rescore:g}" if any(t.rescore for of in pairs.values() for t in of) else ""
    summary = (
        f"{escape(about)}. Greedy: WER {100 * without.rate:.2f} %. Best: WER {100 * chosen.errors.rate:.2f} % with "
        f"alpha {chosen.alpha:g}, beta {chosen.beta:g}{second}, of {len(found)} pairs."
    )
    alphas, betas = sorted({t.alpha for t in found}), sorted({t.beta for t in found})
    if len(alphas) * len(betas) == len(found):
        table = _grid(found, alphas, betas, chosen)
    else:
        rows = [f"<tr><td>{t.alpha:.3f}<td>{t.beta:.3f}{_cell(t, found, chosen)}" for t in
                sorted(found, key=lambda t: t.errors.total)]  # fmt: skip
        table = "<table><tr><th>alpha<th>beta<th>WER" + "\n".join(rows) + "</table>"
    return _PAGE.format(title="Weights of a language model", summary=summary, table=table)


def _grid(found: Sequence[Trial], alphas: Sequence[float], betas: Sequence[float], chosen: Trial) -> str:
    by_weights = {(t.alpha, t.beta): t for t in found}
    lines = ["<table><tr><th>beta \\ alpha", *(f"<th>{a:g}" for a in alphas)]
    for b in reversed(betas):
        lines += [f"<tr><th>{b:g}", *(_cell(by_weights[a, b], found, chosen) for a in alphas)]
    return "\n".join([*lines, "</table>"])


def _cell(trial: Trial, found: Sequence[Trial], chosen: Trial) -> str:
    rates = [t.errors.rate for t in found]
    share = (trial.errors.rate - min(rates)) / max(max(rates) - min(rates), 1e-12)
    name = "cell best" if trial is chosen else "cell"
    return f'<td class="{name}" style="background:hsl({120 * (1 - share):.0f} 70% 72%)">{100 * trial.errors.rate:.2f}'
