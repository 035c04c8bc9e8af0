"""Runs training steps on fake tensors of a pretended device, and lists those of their operations that a CUDA graph
cannot capture. `TRITON_INTERPRET=1 python tests/graph_stand_in.py` prints one JSON object.
"""

import contextlib
import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from graph_recorder import FORBIDDEN, tensors
from graph_rig import Rig, batch
from standins import novograd_functions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from jasper_fast.dispatch import choose
from jasper_fast.kernels import launch
from jasper_fast.kernels.novograd import cuda_launch, table
from jasper_fast.training import graphed, step
from jasper_fast.training.optim import NovoGrad

NAME = "standin"
INSIDE = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)


class Module(backend_registration._DummyBackendModule):
    """The stand-in device, which supports mixed precision."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


class Watch(TorchDispatchMode):
    """Records each op that waits for the device, or has a tensor on the CPU, also inside our own ops.

    It takes the place of `graphed.CudaRecorder`, but replays nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        self.ops += 1
        if name in FORBIDDEN:
            self.found.append(name)
        if func.namespace == "jasper_fast":
            with self:
                return func.redispatch(INSIDE, *args, **kwargs)
        # _fused_adamw_ has no fake implementation in PyTorch
        out = None if name == "_fused_adamw_" else func(*args, **kwargs)
        places = {x.device.type for x in tensors((args, kwargs, out))}
        if places - {NAME}:
            self.found.append(f"{name} on {' and '.join(sorted(places))}")
        return out

    def capture(self, step, alone):
        with self:
            return step(), lambda: None


def one_step(optimizer: str, panes: str, amp: torch.dtype | None) -> dict:
    """Runs three graphed steps: one plain, one captured, one replayed."""
    watch, launched, said = Watch(), [], []
    optimizer, _, face = optimizer.partition(" ")
    NovoGrad._face = lambda self, device, params: face or "triton"
    cuda_launch.functions = lambda: novograd_functions(launched)
    with FakeTensorMode(), launch.recorded(lambda one: launched.append(one.name), 90):
        rig = Rig(
            optimizer, device=f"{NAME}:0", backend="triton", panes=panes, amp_dtype=amp, scale=amp is torch.float16
        )
        parts = rig.model, rig.frontend, rig.optimizer, rig.scaler, rig.guard
        made = graphed.GraphedStep(*parts, **rig.how, recorder=watch, bucket=16, say=said.append)
        for i in range(3):
            made([batch(2, 0.4, 3, i)])
    return {"possible": made.possible, "said": said, "breaks": watch.found, "ops": watch.ops, "launched": launched}


def wrong_ones() -> dict[str, tuple[str, list[str]]]:
    """Returns, for each kind of forbidden op, a part of the message that `Watch` must record, and all messages that
    `Watch` records."""
    with FakeTensorMode():
        x, count = torch.randn(3, device=f"{NAME}:0"), torch.zeros(()) + 2
        cases = {
            "a number that is read": (lambda: bool(x[0] > 0), "_local_scalar_dense"),
            "a copy from the host": (lambda: torch.zeros(3).to(x.device), f"cpu and {NAME}"),
            "a copy into place": (lambda: x.copy_(torch.zeros(3)), f"cpu and {NAME}"),
            "a copy to the host": (lambda: x.cpu(), f"cpu and {NAME}"),
            "a scalar of the CPU": (lambda: x * count, f"cpu and {NAME}"),
            "a size that depends on values": (lambda: x.nonzero(), "nonzero"),
            "distinct values": (lambda: x.unique(), "_unique2"),
        }
        found = {}
        for name, (call, wanted) in cases.items():
            with Watch() as watch, contextlib.suppress(RuntimeError):  # a fake tensor has no values to read
                call()
            found[name] = wanted, watch.found
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    casting = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    # autocast casts nothing on this device, but our own ops read its dtype and cast by themselves
    casting.fallback(torch.library.fallthrough_kernel)
    for module in (step, graphed):
        module.loss_is_capturable = lambda device: True
    choose.ctc_face = lambda backend, device: "triton"
    # the real function reads addresses, which fake tensors do not have
    table.rows_of = lambda tensors, watched: [(0,) * 5 + (64, 0, 0)] * len(tensors.params)
    cases = [("novograd", "gram", torch.float16), ("novograd cuda", "plain", None), ("adamw", "gram", torch.bfloat16)]
    steps = {f"{optimizer} {panes} {amp}": one_step(optimizer, panes, amp) for optimizer, panes, amp in cases}
    print(json.dumps({"steps": steps, "wrong": wrong_ones()}))


if __name__ == "__main__":
    main()
