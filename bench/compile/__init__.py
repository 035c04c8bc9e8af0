"""The ahead-of-time gate: compiles every Triton kernel without a GPU and checks it by rules and committed tables."""
