"""Counter-based random bits: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Every face draws the same dropout bits by this scheme. Backward draws them again, so no mask is stored. Element e =
(n*T + t)*C + c of an NTC tensor uses word e % 4 at the 64-bit counter e // 4. The low half of that counter is word 0 of
Philox's 128-bit counter, the high half is word 1, and words 2 and 3 are 0. The 64-bit seed is the key, low half first.
The element is kept if and only if its word >= p * 2**32. This file is the definition. It uses PyTorch's int64
arithmetic, so it runs on any device.
"""

import math

import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57  # round multipliers
W0, W1 = 0x9E3779B9, 0xBB67AE85  # added to the key after each round
ROUNDS = 10
LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Returns the smallest 32-bit word for which an element is kept: ceil(p * 2**32).

    Raises ValueError unless 0 <= p <= 1 - 2**-32. With a larger p no word would be kept.
    """
    if not 0.0 <= p < 1.0 or math.ceil(p * 2.0**32) > LOW:
        raise ValueError(f"dropout p must be at least 0 and at most 1 - 2**-32, got {p}")
    return math.ceil(p * 2.0**32)


def signed_threshold(p: float) -> tuple[int, float]:
    """Returns the bits of `threshold(p)` as an int32, and the scale 1 / (1 - p).

    Without this conversion, the threshold would be an int32 or an int64 argument of a kernel, depending on p.
    """
    bits = threshold(p)
    return bits - (1 << 32) if bits >= 1 << 31 else bits, 1.0 / (1.0 - p)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor | int, Tensor | int]) -> tuple[Tensor, ...]:
    """Computes Philox4x32-10 of four counter and two key words, which are int64 tensors or ints below 2**32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # an int64 product wraps modulo 2**64, so its bits are those of the unsigned product
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = (p1 >> 32) & LOW ^ c1 ^ k0, p1 & LOW, (p0 >> 32) & LOW ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return c0, c1, c2, c3


def words(start: int, count: int, seed: Tensor | int, device: torch.device | str | None = None) -> Tensor:
    """Returns the 32-bit words at the counters start .. start + count - 1 with the key `seed`: (count, 4) int64.

    seed: an int in the range of int64, or an int64 tensor with one element. The default device is that of the tensor,
    or the CPU for an int.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device).reshape(())
    counter = torch.arange(start, start + count, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(counter)
    drawn = philox4x32((counter & LOW, (counter >> 32) & LOW, zero, zero), (seed & LOW, (seed >> 32) & LOW))
    return torch.stack(drawn, dim=1)


def keep_mask(n: int, c: int, t: int, p: float, seed: Tensor | int, device: torch.device | str | None = None) -> Tensor:
    """Returns which elements of an (N, C, T) activation dropout keeps: bool (N, C, T) in NTC memory order."""
    total = n * c * t
    drawn = words(0, -(-total // 4), seed, device).reshape(-1)[:total]
    return (drawn >= threshold(p)).reshape(n, t, c).transpose(1, 2)
