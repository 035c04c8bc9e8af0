"""jasper_fast: the Jasper speech model with every sub-block in fused kernels.

Importing the package does not import torch: each public name is imported on first use.
"""

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

_here = Path(__file__).parent
if not (_here / "kernels").is_dir():  # a source checkout: kernels/ lies beside this package
    __path__.append(str(_here.parent))

_PUBLIC = {
    "Jasper": "nn.model",
    "JasperConfig": "nn.config",
    "InferenceEngine": "inference",
    "LogMelFeatures": "speech.features",
    "NovoGrad": "training.optim",
    "fuse": "inference.fuse",
    "unfuse": "inference.fuse",
    "beam_search": "lm.search",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    if name == "ops":
        return import_module(f"{__name__}.ops")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, "ops"])
