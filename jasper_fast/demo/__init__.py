"""The demo: a spoken corpus from espeak-ng, a small fused Jasper trained on it, and a report. Run `python -m jasper_fast.demo`."""
