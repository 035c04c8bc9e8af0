"""Contenders of an op at a shape, checked, compiled, timed: what first-use tuning and `jasper-fast tune` run."""
