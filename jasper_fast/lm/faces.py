"""Chooses the face of the prefix search: Triton on a GPU if its results agree with the definition's. Otherwise the CPU
searches, in C++ or, if that is not built, in plain Python."""

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor

from jasper_fast.dispatch import backends
from jasper_fast.kernels import native
from jasper_fast.kernels.prefix_beam import cpu_impl, reference
from jasper_fast.kernels.prefix_beam.ngram import Ngram
from jasper_fast.kernels.prefix_beam.words import Words

FACES = ("auto", "cpu", "triton", "reference")


def choose(backend: str, log_probs: Tensor, beam: int, ngram: Ngram | None, words: Words | None) -> ModuleType:
    """Returns the face for a search. Raises ValueError for an unknown backend, and if "triton" cannot do the search."""
    if backend not in FACES:
        raise ValueError(f"backend {backend!r} must be one of {', '.join(FACES)}")
    if backend == "triton" or (backend == "auto" and log_probs.is_cuda):
        if (why := backends.why_missing("triton", log_probs.device)) is None:
            from jasper_fast.kernels.prefix_beam import triton_impl

            why = triton_impl.why_not(log_probs.shape[2], beam, ngram, words)
        if why is None and (backend == "triton" or trusted(log_probs.device)):
            return triton_impl
        if backend == "triton":
            raise ValueError(f"backend 'triton': {why}")
    return reference if backend == "reference" or (backend == "auto" and not native.cpu_available()) else cpu_impl


@functools.cache
def trusted(device: torch.device) -> bool:
    """Returns whether Triton's face agrees with the definition on a small case on ``device``; warns if it does not."""
    from jasper_fast.kernels.prefix_beam import triton_impl

    log_probs = (2 * torch.randn(3, 12, 29, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    case = torch.tensor([12, 7, 0]), 40, 4, None, 0.0, 0.25
    want = reference.search(log_probs, *case)
    try:
        got = [found.cpu() for found in triton_impl.search(log_probs.to(device), *case)]
        fine = all(torch.equal(w, g) for w, g in zip(want[:2], got[:2])) and torch.allclose(want[2], got[2], atol=1e-9)
        why = "its results differ from the definition's"
    except Exception as error:  # compiler and driver raise errors of any kind
        fine, why = False, " ".join(str(error).split())[:200]
    if not fine:
        warnings.warn(f"Triton's beam search is not used on {device}, so the CPU searches: {why}", stacklevel=2)
    return fine
