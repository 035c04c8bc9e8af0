"""Seeds of inputs and weights, the same in every process."""

import hashlib

import torch


def seeded(seed: int, device: torch.device) -> torch.Generator:
    """A generator for inputs, on the device that holds them."""
    return torch.Generator(device).manual_seed(seed)


def stable_seed(*parts: object) -> int:
    """A seed made from names, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")
