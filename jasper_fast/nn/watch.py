"""Whether modules are as they were: their settings, their parts, and the values of their tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from jasper_fast.nn.recognise import Unfit

# What decides which function a module of a Jasper computes in evaluation, in this project and in others.
SETTINGS = (
    *("forward", "training", "eps", "track_running_stats", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("padding_mode", "masked", "use_mask", "heads", "pad_layer", "dense_residual", "residual_mode", "separable", "se"),
    *("res", "adapter_layer", "cfg"),
)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Watch:
    """Remembers `modules` as they are now; `same()` tells whether they still are.

    A tensor counts as changed if its version, its memory or its strides are other ones, or if the module has another
    tensor in its place. The old memory is kept, so that no new tensor can lie at its address. Writes through `p.data`,
    the kernels of `torch.optim`'s `fused=True` and replays of CUDA graphs raise no version, so they are not seen.

    Raises Unfit if a tensor was made in inference mode: such a tensor has no version.
    """

    def __init__(self, modules: Iterable[nn.Module]):
        self._settings: list[tuple] = []
        self._parts: list[tuple] = []
        self._tensors: list[tuple] = []
        self._hooks: list[dict] = []
        self._held: list[Tensor] = []  # aliases
        for m in modules:
            own = vars(m)
            names = [name for name in SETTINGS if name in own or name == "forward"]
            self._settings.append((own.get, names, [own.get(name) for name in names]))
            self._parts.append((m._modules, [*m._modules.values()]))
            self._hooks += [own[name] for name in _HOOKS]
            for tensors in (m._parameters, m._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and name != "num_batches_tracked":
                        if tensor.is_inference():
                            raise Unfit("weights made in inference mode, whose changes nobody can notice")
                        found = tensor, tensor._version, tensor.data_ptr(), tensor.stride()
                        self._tensors.append((tensors, name, *found))
                        self._held.append(tensor.detach())

    def same(self) -> bool:
        """Whether everything is as it was."""
        return (
            all(list(map(get, names)) == then for get, names, then in self._settings)
            and all([*parts.values()] == then for parts, then in self._parts)
            and all(
                of.get(name) is tensor
                and tensor._version == version
                and tensor.data_ptr() == at
                and tensor.stride() == strides
                for of, name, tensor, version, at, strides in self._tensors
            )
        )

    def hooked(self) -> bool:
        """Whether one of the modules has hooks."""
        return any(self._hooks)

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        """Whether one of these is among the tensors of the modules."""
        return not {id(t) for t in tensors}.isdisjoint(id(found[2]) for found in self._tensors)
