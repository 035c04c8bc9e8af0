"""The self-check: compares every kernel with fp64, in a process of its own."""
