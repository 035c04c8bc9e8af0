"""The demo trains a small fused Jasper on speech from espeak-ng and writes a report: `python -m jasper_fast.demo`."""
