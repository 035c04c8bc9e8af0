"""The `jasper_fast` namespace of torch.library, which every op of this package is defined in."""

from __future__ import annotations

import functools

import torch

lib = torch.library.Library("jasper_fast", "DEF")


def without_autocast(impl):
    """`impl` run with autocast off: an op's inside chooses its own dtypes."""

    @functools.wraps(impl)
    def run(x, *args):
        device = (x[0] if isinstance(x, (list, tuple)) else x).device.type
        if not torch.is_autocast_enabled(device):
            return impl(x, *args)
        with torch.autocast(device, enabled=False):
            return impl(x, *args)

    return run
