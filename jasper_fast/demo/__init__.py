"""The demo: an espeak-ng corpus, a small fused Jasper trained on it, a report. Run `python -m jasper_fast.demo`."""
