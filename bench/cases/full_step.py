"""The full training step of train.py, for every contender.

The step includes the check for NaN, the guard of the running statistics, and the moving average of the weights.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from jasper_fast import Jasper, NovoGrad
from jasper_fast.bench.harness.errors import Absent
from jasper_fast.bench.rivals.eager_layouts import Model
from jasper_fast.bench.rivals.optimizers import ForeachNovoGrad
from jasper_fast.data.batch import Batch
from jasper_fast.nn.architecture import out_lengths
from jasper_fast.training.graphed import GraphedStep
from jasper_fast.training.optim import EMA
from jasper_fast.training.step import BufferGuard, train_step

LR, WEIGHT_DECAY, DECAY = 1e-4, 1e-3, 0.999


class Trained(nn.Module):
    """A contender with the interface that `train_step` expects. `call` computes the model with the parameters and
    buffers of `module`."""

    def __init__(self, module: nn.Module, call: Model, cfg) -> None:
        super().__init__()
        self.inner, self.cfg = module, cfg
        self._calls = [call]  # in a list, so that it is not registered as a submodule

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the log-probabilities and their lengths."""
        return self._calls[0](features, lengths)

    def out_lengths(self, lengths: Tensor) -> Tensor:
        """Returns the number of output frames for each number of input frames."""
        return out_lengths(self.cfg, lengths)


def full_step(
    module: nn.Module,
    call: Model,
    cfg,
    inputs: Callable[[], tuple[Tensor, ...]],
    dtype: torch.dtype,
    wrap: Callable[[nn.Module], nn.Module] = lambda trained: trained,
    graphs: bool = False,
) -> Callable[[], None]:
    """Returns a function that makes one step by `train_step`.

    `inputs` returns features, their lengths, transcripts and their lengths, with the lengths on the host. Our `Jasper`
    is trained with `NovoGrad` on the model's backend, which also updates the moving average. Every other model is
    trained in PyTorch's usual way: NovoGrad consists of foreach operations, the average has a separate pass, and the
    host decides whether to skip the step. `wrap` wraps the model for several processes.

    With `graphs` the step is a CUDA graph from the second call on. If the step cannot be captured, `full_step` or the
    second call raises Absent.
    """
    trained = Trained(module, call, cfg).train()
    learning = [p for p in module.parameters() if p.requires_grad]
    device, ema = learning[0].device, EMA(trained, DECAY)
    ours = isinstance(module, Jasper)
    kind = functools.partial(NovoGrad, ema=ema, backend=module.backend) if ours else ForeachNovoGrad
    optimizer = kind(learning, lr=LR, weight_decay=WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    called = wrap(trained)
    how = {
        "optimizer": optimizer, "scaler": scaler, "guard": BufferGuard(trained), "ema": ema, "device": device,
        "amp_dtype": None if dtype is torch.float32 else dtype,
    }  # fmt: skip
    frontend = lambda x, lengths: (x, lengths.to(device, non_blocking=True), lengths)  # noqa: E731
    step = functools.partial(train_step, called, frontend, **how)
    if graphs:
        step = GraphedStep(called, frontend, **how, say=_absent)

    def run() -> None:
        features, lengths, targets, target_lengths = inputs()
        names = [str(i) for i in range(len(features))]
        step([Batch(features, lengths, targets, target_lengths, names, names, [])])

    return run


def _absent(why: str) -> None:
    raise Absent(why)
