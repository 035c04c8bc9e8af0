"""The ahead-of-time gate: compiles every kernel without a GPU and checks it by rules and by committed tables."""
