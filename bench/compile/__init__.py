"""The ahead-of-time gate: every Triton kernel compiled without a GPU, against rules and committed tables."""
