"""Detects changes in modules: in their settings, their submodules, and the values of their tensors."""

import operator
from collections.abc import Iterable

from torch import Tensor, nn

from jasper_fast.nn.recognise import HOOKS, Unfit

# In evaluation, the result of a module of a Jasper (this project's or another's) depends on its tensors and on these
# attributes.
SETTINGS = (
    *("forward", "training", "eps", "track_running_stats", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("padding_mode", "masked", "use_mask", "heads", "pad_layer", "dense_residual", "residual_mode", "separable", "se"),
    *("res", "adapter_layer", "cfg"),
)
_VERSION = operator.attrgetter("_version")


class Watch:
    """Remembers the present state of `modules`; `same()` tells whether it has changed.

    A tensor counts as changed if its `_version`, address or strides differ, or if another tensor has taken its place.
    The old memory is kept, so no new tensor can get its address. Some writes do not raise `_version` and go unnoticed:
    those through `p.data`, by `torch.optim` with `fused=True`, by collectives of `torch.distributed`, and by replays of
    CUDA graphs.

    Raises Unfit if a tensor was made in inference mode, because such a tensor has no version.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        modules = list(modules)
        self._settings = _Entries(
            [(vars(m), name) for m in modules for name in SETTINGS if name in vars(m) or name == "forward"]
        )
        self._parts = _Entries([(m._modules, name) for m in modules for name in m._modules])
        self._sizes = [(m._modules, len(m._modules)) for m in modules]
        of = (tensors for m in modules for tensors in (m._parameters, m._buffers))
        self._places = _Entries([(ts, name) for ts in of for name in ts if name != "num_batches_tracked"])
        self._tensors = [tensor for tensor in self._places.then if tensor is not None]
        if any(tensor.is_inference() for tensor in self._tensors):
            raise Unfit("weights made in inference mode, whose changes cannot be noticed")
        self._held = [tensor.detach() for tensor in self._tensors]  # aliases, which keep the memory
        self._matrices = [tensor for tensor in self._tensors if tensor.dim() > 1]
        self._values = self._now()
        self._hooks = [vars(m)[name] for m in modules for name in HOOKS]

    def _now(self) -> tuple[list, ...]:
        """Returns versions, addresses and strides, which change when a tensor does."""
        versions, addresses = (list(map(of, self._tensors)) for of in (_VERSION, Tensor.data_ptr))
        return versions, addresses, list(map(Tensor.stride, self._matrices))

    def same(self) -> bool:
        """Returns whether nothing has changed."""
        return (
            self._settings.equal()
            and self._parts.same()
            and all(len(parts) == then for parts, then in self._sizes)
            and self._places.same()
            and self._now() == self._values
        )

    def hooked(self) -> bool:
        """Returns whether one of the modules has hooks."""
        return any(self._hooks)

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        """Returns whether one of `tensors` belongs to the modules."""
        return not {id(t) for t in tensors}.isdisjoint(map(id, self._tensors))


class _Entries:
    """Dictionary entries and their remembered values. `map` makes the loops run in C, because an engine checks
    thousands of entries per call."""

    def __init__(self, places: list[tuple[dict, str]]):
        self._of, self._names = [of for of, _ in places], [name for _, name in places]
        self.then = self._now()

    def _now(self) -> list:
        return list(map(dict.get, self._of, self._names))

    def equal(self) -> bool:
        return self._now() == self.then

    def same(self) -> bool:
        return all(map(operator.is_, self._now(), self.then))
