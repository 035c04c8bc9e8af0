"""Decides which GPUs are alike: same compute capability, similar number of multiprocessors and memory bandwidth.

Times measured on one GPU are then a good estimate for the other. The same tiles fit into shared memory and registers,
about the same number of programs run at the same time, and a kernel is limited by the same resource.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

# Largest ratio of the bandwidths of GPUs that are alike. H100 and H100 NVL are alike, H100 and H200 are not.
SPREAD = 1.25
# Largest ratio of their numbers of multiprocessors. Cards with the same chip may have some of them disabled.
SM_SPREAD = 1.1


class Traits(NamedTuple):
    """A GPU's compute capability ("sm_90"), number of multiprocessors, and memory bytes per second (0: unknown)."""

    capability: str
    sms: int
    bytes_s: float


def traits(index: int) -> Traits | None:
    """Returns the traits of CUDA device `index`, or None if PyTorch sees no GPU."""
    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(index)
    # The clock is in kHz, and memory makes two transfers per clock. Older versions of torch lack these properties.
    clock, bits = getattr(p, "memory_clock_rate", 0), getattr(p, "memory_bus_width", 0)
    return Traits(f"sm_{p.major}{p.minor}", p.multi_processor_count, 2e3 * clock * bits / 8)


def header(found: Traits | None) -> dict[str, str]:
    """Returns the fields of a table's header that describe the GPU's multiprocessors and bandwidth."""
    if found is None:
        return {"multiprocessors": "unknown", "bandwidth": "unknown"}
    bandwidth = f"{found.bytes_s / 1e9:.0f} GB/s" if found.bytes_s else "unknown"
    return {"multiprocessors": str(found.sms), "bandwidth": bandwidth}


def of_header(fields: Mapping[str, str]) -> Traits | None:
    """Returns the traits that a table's header gives, or None if its multiprocessors are unknown."""
    sms, bandwidth = fields["multiprocessors"], fields["bandwidth"].removesuffix(" GB/s")
    if not sms.isdecimal():
        return None
    return Traits(fields["capability"], int(sms), 1e9 * float(bandwidth) if bandwidth.isdecimal() else 0.0)


def distance(a: Traits | None, b: Traits | None) -> float:
    """Returns how different two GPUs are: 0 if their traits are equal, infinity if they are not alike or not known."""
    if a is None or b is None or a.capability != b.capability or not all((a.sms, b.sms, a.bytes_s, b.bytes_s)):
        return math.inf
    sms, bandwidth = abs(math.log(a.sms / b.sms)), abs(math.log(a.bytes_s / b.bytes_s))
    return math.inf if sms > math.log(SM_SPREAD) or bandwidth > math.log(SPREAD) else sms + bandwidth
