"""Seeds of inputs and weights, which are the same in every process."""

import hashlib

import torch


def seeded(seed: int, device: torch.device) -> torch.Generator:
    """Returns a generator on `device` with this seed."""
    return torch.Generator(device).manual_seed(seed)


def stable_seed(*parts: object) -> int:
    """Returns a seed made from `parts`. Unlike `hash`, it is the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
