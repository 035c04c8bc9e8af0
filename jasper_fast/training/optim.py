"""The NovoGrad optimiser and the moving average of a model. A step of NovoGrad can also update the average."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from jasper_fast.dispatch import backends, choose
from jasper_fast.kernels import capture
from jasper_fast.kernels.novograd.operands import Settings, Tensors, Watched
from jasper_fast.kernels.novograd.reference import average
from jasper_fast.nn.config import refuse


class EMA:
    """Moving average of everything in `model.state_dict()`: `average = decay * average + (1 - decay) * live`.

    Floating-point entries (parameters, running statistics) are averaged on their own device. Integer entries
    (`num_batches_tracked`) are copied. Nothing waits for the device. The average starts as a copy of the model. With
    `warmup` the decay of update t (counted from 1) is `min(decay, (1 + t) / (10 + t))`, so that a short run forgets its
    initial weights. Raises ValueError for a decay outside [0, 1).

    `NovoGrad(params, ..., ema=ema)` updates the average in the optimiser's step. With other optimisers, call `update`.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, warmup: bool = False):
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the moving average must lie in [0, 1), got {decay}")
        self.decay, self.warmup, self.updates, self.model = decay, warmup, 0, model
        live = model.state_dict(keep_vars=True)
        copies = {tensor: tensor.detach().clone() for tensor in live.values()}
        self.average = {name: copies[tensor] for name, tensor in live.items()}

    @property
    def decay_now(self) -> float:
        """The decay of the latest update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    def update(self, model: nn.Module) -> None:
        """Adds the model's current state to the average. Call it after each optimiser step."""
        self.updates += 1
        pairs = self._pairs(model)
        self.take([(list(pairs), list(pairs.values()))])

    def begin(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Begins an update that the optimiser completes. Returns (tensor, its average) for each tensor of the model."""
        self.updates += 1
        return self._pairs(self.model).items()

    def _pairs(self, model: nn.Module) -> dict[Tensor, Tensor]:
        """Returns the average of each tensor of `model`. Tied weights are one tensor and have one average."""
        live = model.state_dict(keep_vars=True)
        return {live[name]: mean for name, mean in self.average.items()}

    @torch.no_grad()
    def take(self, pairs: Iterable[tuple[list[Tensor], list[Tensor]]]) -> None:
        """Updates the averages in `pairs` (list of tensors of the model, list of their averages)."""
        for lives, averages in pairs:
            average(lives, averages, 1 - self.decay_now)

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """A context in which the model has the averaged weights. At the end its own weights are restored, also after
        an exception.

        Weights and averages are swapped one tensor at a time, so the swap needs memory for only one more tensor. Do not
        call `update` inside.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for tensor, mean in self._pairs(model).items():
            # A copy in place raises the version counter of the tensor, by which an engine notices changed weights.
            live = tensor.clone()
            tensor.copy_(mean)
            mean.copy_(live)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averaged state dict, under the model's own names."""
        return dict(self.average)

    def load_state_dict(self, state_dict: dict[str, Tensor], updates: int = 0) -> None:
        """Loads a saved average. `updates`: the number of its updates so far, on which the decay's warm-up depends.

        Raises KeyError if entries of the model are missing.
        """
        missing = sorted(self.average.keys() - state_dict.keys())
        if missing:
            raise KeyError(f"the saved average lacks {len(missing)} entries of this model, such as {missing[0]}")
        self.updates = updates
        for name, tensor in self.average.items():
            tensor.copy_(state_dict[name])


class NovoGrad(torch.optim.Optimizer):
    """NovoGrad (Ginsburg et al., 2019), with the update of NVIDIA's Jasper: the second moment is one scalar per tensor.

    `params`: floating-point parameters or groups of them. `lr`: a float or a one-element tensor. `betas`: decay rates
    of the first and second moment. `grad_averaging`: scales each new term of the first moment by `1 - beta1`. `ema`: a
    moving average of the model, which each step updates, so do not call `ema.update` as well. `backend`: the face that
    runs the step, see `jasper_fast.dispatch`. The state of a parameter is `exp_avg` (of its shape and dtype) and
    `exp_avg_sq` (a scalar, fp32 or fp64). Gradients are not changed. Nothing waits for the device. If a `GradScaler`
    has found an infinity (`found_inf`, read on the device), parameters and state do not change.
    Raises ValueError for settings out of range. A step raises RuntimeError for sparse gradients, and ValueError if
    `ema` was made of another model. Equivalent, for one parameter `p` with gradient `g`:

        v = (g * g).sum() if v == 0 else beta2 * v + (1 - beta2) * (g * g).sum()
        u = g / (v.sqrt() + eps) + weight_decay * p
        m = beta1 * m + (u * (1 - beta1) if grad_averaging else u)
        p = p - lr * m
    """

    # With this, a GradScaler passes `grad_scale` and `found_inf` to `step` instead of waiting for the device.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_averaging: bool = False,
        *,
        ema: EMA | None = None,
        backend: str = "auto",
    ):
        refuse(
            ValueError,
            (not isinstance(lr, Tensor) and lr < 0, f"lr must not be negative, got {lr}"),
            (not (0 <= betas[0] < 1 and 0 <= betas[1] < 1), f"betas must lie in [0, 1), got {betas}"),
            (eps < 0 or weight_decay < 0, f"eps and weight_decay must not be negative, got {eps} and {weight_decay}"),
        )
        self.ema, self.backend = ema, backends.check(backend)
        self._held: dict[torch.device, dict] = {}
        super().__init__(params, {
            "lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "grad_averaging": grad_averaging
        })  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient. Returns the closure's value, or None without a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(getattr(self, "grad_scale", None), getattr(self, "found_inf", None), 0.0, guard=False)
        return loss

    @torch.no_grad()
    def guarded_step(self, grad_scale: Tensor | None = None, clip_norm: float = 0.0) -> Tensor:
        """Updates every parameter that has a gradient, unless the gradients' norm is NaN or infinite.

        Gradients are divided by `grad_scale` and clipped to the norm `clip_norm` (0: not clipped). If the norm is not
        finite, parameters and moments stay as they are, and only the average of the model is updated. Returns a tensor
        (2,) on the device: the norm before clipping, and 1.0 if that norm is NaN or infinite, else 0.0. Raises
        RuntimeError if the parameters are on several devices.
        """
        found = self._step(grad_scale, None, clip_norm, guard=True)
        if len(found) > 1:
            raise RuntimeError(f"a guarded step needs all parameters on one device, not on {len(found)} devices")
        return found[0] if found else torch.zeros(2)

    @contextlib.contextmanager
    def holding(self, held: dict) -> Iterator[None]:
        """A context in which steps keep their tables of addresses and settings, which are on the device, in `held`.

        A CUDA graph of a step reads these tables in each replay. So each graph needs tables of its own, which must live
        as long as the graph.
        """
        before, self._held = self._held, held
        try:
            yield
        finally:
            self._held = before

    @torch.no_grad()
    def renew(self, held: dict) -> None:
        """Prepares the replay of a CUDA graph that was captured inside `holding(held)`.

        Copies changed settings, such as the learning rate, to the device, and counts the moving average's update.
        """
        if self.ema is not None:
            self.ema.updates += 1
        with self.holding(held):
            for device in held:
                self._settings(device)

    def _step(self, grad_scale: Tensor | None, found_inf: Tensor | None, clip_norm: float, guard: bool) -> list[Tensor]:
        ready = [(p, i) for i, group in enumerate(self.param_groups) for p in group["params"] if p.grad is not None]
        averaged, watched = self._averages([p for p, _ in ready])
        found = []
        for device in dict.fromkeys(p.device for p, _ in ready):
            mine = [(p, i) for p, i in ready if p.device == device]
            tensors = self._tensors(mine, averaged)
            moved = (x if x is None else x.to(device, non_blocking=True) for x in (grad_scale, found_inf))
            step = backends.face("novograd", self._face(device, [p for p, _ in mine])).step
            settings, held = self._settings(device), self._held.setdefault(device, {})
            found.append(step(tensors, watched.pop(device, Watched([], [])), settings, *moved, clip_norm, guard, held))
        if watched:  # averages on devices where no parameter has a gradient
            self.ema.take(watched.values())
        return found

    def in_kernels(self) -> bool:
        """Returns whether our kernels update all parameters. Only then can a CUDA graph capture a step."""
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        return all(self._face(p.device, [p]) != "reference" for p in params)

    def _face(self, device: torch.device, params: list[Tensor]) -> str:
        """Returns the face that updates `params`: the one that dispatch chooses if all are dense fp32, else
        "reference"."""
        if not all(p.dtype == torch.float32 and _dense(p) for p in params):
            return "reference"
        return choose.resolve(self.backend, device, backends.NOVOGRAD, torch.float32)

    def _tensors(self, ready: list[tuple[Tensor, int]], averaged: dict[Tensor, Tensor]) -> Tensors:
        params, groups = [p for p, _ in ready], [i for _, i in ready]
        if any(p.grad.is_sparse for p in params):
            raise RuntimeError("NovoGrad takes dense gradients only: build the layer with sparse=False")
        new = [p for p in params if not self.state[p]]
        for dtype in dict.fromkeys(p.dtype for p in new):
            of = [p for p in new if p.dtype == dtype]
            # views of one tensor, so that one kernel fills all of them
            squares = of[0].new_zeros(len(of), dtype=torch.promote_types(dtype, torch.float32)).unbind()
            for p, square in zip(of, squares, strict=True):
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=square)
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            state["exp_avg"] = _like(p, state["exp_avg"])  # a loaded moment may have another memory order
        moments, squares = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        averages = [averaged[p] for p in params] if averaged else []
        return Tensors([_like(p, p.grad) for p in params], params, moments, squares, averages, groups)

    def _averages(self, ready: list[Tensor]) -> tuple[dict[Tensor, Tensor], dict[torch.device, Watched]]:
        """Returns the average of each parameter in `ready`, and all other averaged tensors by device."""
        if self.ema is None:
            return {}, {}
        moving, averaged, watched = set(ready), {}, {}
        for live, mean in self.ema.begin():
            if live in moving:
                averaged[live] = mean
            else:
                lives, averages = watched.setdefault(mean.device, Watched([], []))
                lives.append(live), averages.append(mean)
        if len(averaged) != len(moving):
            raise ValueError(
                "the moving average lacks some of the optimised parameters: make it of the model that has them"
            )
        return averaged, watched

    def _settings(self, device: torch.device) -> Tensor:
        """Returns the settings on `device`, one row per group (see kernels/novograd/operands.py).

        Copies them to the device only if one of them has changed. A learning rate that is a tensor is always copied.
        """
        rates = {i: group["lr"] for i, group in enumerate(self.param_groups) if isinstance(group["lr"], Tensor)}
        rows, weight = [], 1 - self.ema.decay_now if self.ema else 0.0
        for i, group in enumerate(self.param_groups):
            beta1, beta2 = group["betas"]
            share = 1 - beta1 if group["grad_averaging"] else 1.0
            lr, decay = 0.0 if i in rates else group["lr"], share * group["weight_decay"]
            rows.append(Settings(lr, beta1, share, beta2, 1 - beta2, group["eps"], decay, weight))
        held = self._held.setdefault(device, {})
        if held.get("settings_of") != rows:
            old = held.get("settings")
            old = old if old is not None and len(old) == len(rows) else None
            held.update(settings_of=rows, settings=capture.sent(rows, torch.float64, device, old))
        for i, lr in rates.items():
            held["settings"][i, 0].copy_(lr.reshape(()), non_blocking=True)
        return held["settings"]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"ema": None, "backend": self.backend, "_held": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like `torch.optim.Optimizer`, but `exp_avg_sq` is not converted to the parameter's dtype."""
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, i in zip(order, saved, strict=True):
            if "exp_avg_sq" in state_dict["state"].get(i, {}):
                wide = torch.promote_types(p.dtype, torch.float32)
                self.state[p]["exp_avg_sq"] = state_dict["state"][i]["exp_avg_sq"].to(p.device, wide, copy=True)


def _dense(p: Tensor) -> bool:
    return p.is_contiguous() or torch._prims_common.is_non_overlapping_and_dense(p)


def _like(p: Tensor, x: Tensor) -> Tensor:
    """Returns `x` in the memory order of `p`: a copy if their orders differ and `p` is dense, else `x` itself.

    The stride of a dimension of size 1 does not matter.
    """
    alike = x.stride() == p.stride() or all(
        a == b or n < 2 for a, b, n in zip(x.stride(), p.stride(), p.shape, strict=True)
    )
    return x if alike or not _dense(p) else torch.empty_like(p).copy_(x)
