"""Finds the fastest implementation of each op at each shape, for first-use tuning and `jasper-fast tune`.

A *cell* is an op at a shape (`kernels.tables.Cell`). A *contender* is one way to run it: a face and, for some faces, a
tile. Our contenders are checked first. Those that are correct are timed, and so is plain PyTorch.
"""
