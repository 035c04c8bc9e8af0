"""Cases of `python -m bench train`: forward and backward of a network with CTC, and its full step with the
optimiser."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from jasper_fast.bench.cases import common, counts, models
from jasper_fast.bench.cases.full_step import full_step
from jasper_fast.bench.harness import correct, cudnn_search, limits
from jasper_fast.bench.harness.case import Case, Contender, Runner
from jasper_fast.bench.harness.run import Run
from jasper_fast.bench.harness.seeds import seeded, stable_seed
from jasper_fast.bench.rivals import choice
from jasper_fast.bench.rivals.eager_layouts import ChannelsLast2d, Model

FULL = ", all lengths full"  # added to the name of a mode whose utterances have no padding
TRAINS = ("bn_relu_dropout", "conv1d", "panes")  # the ops of a training step, by their names in the self-check
# If rounding moves the input of a single ReLU across zero, some gradients change by about one per cent, in eager
# PyTorch as in any kernel. So the bounds are loose for the gradients of a network with its usual weights. On the inputs
# of CLEAR_SEED the network has other weights, with which no ReLU has an input near zero (models.clear). There the
# bounds are tight.
#
# The bounds come from the largest errors of correct contenders on a CPU, relative to the fp64 gradient. The table has
# these errors in the RMS norm, in the max norm, and along the fp64 gradient (see Tolerance). They were measured with
# eager, eager_2d_channels_last and our CPU kernels, and in bf16 also with our reference implementation. With clear
# weights the models were small at (8, 64, 400) and (2, 64, 64), and medium at (4, 64, 400), with one to five seeds.
# With usual weights the model was small at (8, 64, 400), with three seeds. The usual bounds for fp16 were not measured:
# those for bf16 are used, with the eps of fp16 and a tighter bound along the gradient. Jasper 10x5 at (2, 64, 128) with
# clear weights has RMS errors up to twice those in the table, and along the gradient 0.09 % in fp16 and 1.4 % in bf16.
#
#                    RMS: weight, gamma, beta    max: weight, gamma, beta    along: weight, gamma, beta
#     clear   fp32   6e-6    8e-6    2e-5        9e-6    9e-6    2e-5        7e-7    9e-7    1.4e-6
#             fp16   0.4 %   0.4 %   1.4 %       0.5 %   0.5 %   1.3 %       0.06 %  0.07 %  0.2 %
#             bf16   3.1 %   3.2 %   9.4 %       4.0 %   5.2 %   12 %        0.6 %   0.6 %   1.5 %
#     usual   fp32   1.5 % (all parameters)      7.6 %                       0.16 %
#             bf16   28 %                        41 %                        7.9 %
CLEAR_SEED = 1
SCALES = (65536.0, 4096.0, 256.0, 16.0, 1.0)  # loss scales to try in fp16; a GradScaler starts with the first
ALONG = {torch.float32: 5e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
ALONG_USUAL = {torch.float32: 5e-3, torch.float16: 5e-2, torch.bfloat16: 0.2}


def tolerance(dtype: torch.dtype, cfg=None) -> correct.Tolerance:
    """Returns how far the answers of a step in `dtype` may be from those in fp64.

    The fields `relative` of the tolerance are used if there is no eager step to compare with. If `cfg` has separable
    convs, the bounds along the gradient are eight times as wide with clear weights, and three times as wide with usual
    weights. QuartzNet 15x5 needs this: it has 155 convs in series, and Jasper 10x5 has 53. The largest errors of
    QuartzNet 15x5 along the gradient, at (2, 64, 400) in fp32, are 1e-5 (eager) and 1.8e-5 (ours) with clear weights,
    and 0.82 % (eager) and 0.85 % (ours) with usual weights.
    """
    separable = cfg is not None and any(b.separable for b in cfg.encoder.blocks)
    along, along_usual = ALONG[dtype] * (8 if separable else 1), ALONG_USUAL[dtype] * (3 if separable else 1)
    fp32, eps = dtype is torch.float32, torch.finfo(dtype).eps
    one = eps / torch.finfo(torch.float32).eps  # the eps of `dtype` in units of the eps of fp32; gradients are in fp32
    usual = correct.Tolerance(
        2.0,
        0.03 / eps if fp32 else 8 * one,
        relative=0.03 if fp32 else 0.5,
        peak=10.0 if fp32 else 2.0,
        along=along_usual,
    )
    clear = correct.Tolerance(
        2.0, 64.0 if fp32 else 2 * one, relative=5e-5 if fp32 else 24 * eps, peak=2.0, along=along
    )
    # Eager's loss, which is one number, may be exact by chance. So in 16 bits a tenth of an eps is always allowed, and
    # in fp32 256 eps.
    floor, relative = (256.0, 1e-4) if fp32 else (one / 10, 8 * eps)
    return correct.Tolerance(4.0, floor, relative=relative, gradients=usual, clear=clear)


def precision(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype whose rounding errors a step in `dtype` has: fp16 instead of fp32 if convs use TF32, which is
    as precise as fp16."""
    return torch.float16 if dtype is torch.float32 and limits.float32_mode(device) == "TF32" else dtype


class Batch:
    """Features, lengths and transcripts, which are refilled in place.

    If `clear` is true, the answer to this batch is computed with the weights of `models.clear`, which keep the
    inputs of all ReLUs away from zero.
    """

    def __init__(self, cfg, N: int, T: int, device: torch.device, ragged: bool = True) -> None:
        self.cfg, self.N, self.T, self.device, self.ragged = cfg, N, T, device, ragged
        self.clear = False
        self.features, self.lengths = models.features(cfg, N, T, device, 0, ragged)
        self.targets, self.target_lengths = models.targets(N, T // 2, device, 0, cfg.decoder.n_classes)
        self.on_host = self.lengths.cpu(), self.target_lengths.cpu()

    def as_read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns features, lengths, transcripts and their lengths, with the lengths on the host as from a data
        loader."""
        return self.features, self.on_host[0], self.targets, self.on_host[1]

    def refill(self, seed: int) -> None:
        """Writes new features, lengths and transcripts into the tensors."""
        self.clear = seed == CLEAR_SEED
        features, lengths = models.features(self.cfg, self.N, self.T, self.device, seed, self.ragged)
        self.features.copy_(features)
        self.lengths.copy_(lengths)
        self.on_host[0].copy_(lengths)
        targets, _ = models.targets(self.N, self.T // 2, self.device, seed, self.cfg.decoder.n_classes)
        self.targets.copy_(targets)

    def loss(self, model: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (loss, log-probabilities, their lengths), computed under autocast if `dtype` has 16 bits."""
        with common.autocast(self.device, dtype):
            log_probs, lengths = model(self.features.to(next(model.parameters()).dtype), self.lengths)
        return models.ctc(log_probs, lengths, self.targets, self.target_lengths), log_probs, lengths

    def cotangent(self, log_probs: Tensor, lengths: Tensor) -> Tensor:
        """Returns random weights for a sum of the log-probabilities. They are zero beyond the lengths."""
        g = seeded(stable_seed("cotangent"), self.device)
        random = torch.randn(log_probs.shape, generator=g, device=self.device)
        return models.valid(random, lengths).to(log_probs) / math.sqrt(self.N * log_probs.shape[1])


def runner(
    module: nn.Module,
    call: Model,
    batch: Batch,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    mode: str,
    graphs: bool = False,
) -> Runner:
    """Returns the runner of a training step.

    `call` computes the model with the parameters of `module`, whose names may differ from those in `state`. The timed
    step has dropout on, and in fp16 a scaled loss, because small gradients would be zero otherwise. In the mode "step"
    it is the full step of train.py.
    """
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler(batch.device.type, enabled=dtype is torch.float16)

    def run() -> None:
        for p in parameters:
            p.grad = None
        scaler.scale(batch.loss(call, dtype)[0]).backward()

    if mode == "step":
        run = full_step(module, call, batch.cfg, batch.as_read, dtype, graphs=graphs)
    return Runner(run, lambda: answer(module, call, batch, state, dtype))


def answer(
    module: nn.Module, call: Model, batch: Batch, state: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns the log-probabilities, loss, gradients and running statistics of one step from `state`, with dropout off.

    If the batch is `clear`, there is no loss. The gradients are then those of a random sum of the log-probabilities, to
    which every frame contributes equally. Afterwards the module has the weights of `state`. In fp16 the loss is scaled
    by the largest of SCALES at which nothing overflows, and the gradients are scaled back.
    """
    weights = models.clear(batch.cfg, state) if batch.clear else state
    module.train()
    for scale in SCALES if dtype is torch.float16 else (1.0,):
        restore(module, weights)
        module.zero_grad(set_to_none=True)
        with models.dropout_off(module):
            loss, log_probs, lengths = batch.loss(call, dtype)
            if batch.clear:
                loss = (log_probs * batch.cotangent(log_probs, lengths)).sum()
            (loss * scale).backward()
        if all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None):
            break
    found = {"log_probs": models.valid(log_probs.detach(), lengths)}
    found |= {} if batch.clear else {"loss": loss.detach()}
    kind = "clear grad" if batch.clear else "grad"
    gradients = {original(name): p.grad for name, p in module.named_parameters() if p.grad is not None}
    found |= {f"{kind} {name}": grad.reshape(state[name].shape) / scale for name, grad in gradients.items()}
    found |= {original(name): b.clone() for name, b in module.named_buffers() if "running" in name}
    module.zero_grad(set_to_none=True)
    if batch.clear:
        restore(module, state)
    return found


def eager_answer(
    batch: Batch, state: Mapping[str, Tensor], dtype: torch.dtype, autocast_dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns the answer of the eager model with weights in `dtype`, computed under autocast to `autocast_dtype`."""
    module = models.eager(batch.cfg, state, dtype)
    return answer(module, module, batch, state, autocast_dtype)


@torch.no_grad()
def restore(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies `state` into a module, whose names and shapes a rival may have changed."""
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        t.copy_(state[original(name)].reshape(t.shape))


def original(name: str) -> str:
    """Returns a parameter's name in the state dict, for its name in a module that a rival has wrapped."""
    return name.removeprefix("_orig_mod.").removeprefix("model.")


def judged_size(device: torch.device, cfg, N: int, T: int) -> tuple[int, int]:
    """Returns the (N, T) of the batch on which the answers of contenders are compared.

    For a large network on a GPU it is a smaller batch than the timed one, because the fp64 step would take tens of
    seconds and tens of GiB. `python -m bench kernels` compares each op of such a network at full size.
    """
    return (min(N, 2), T) if device.type == "cuda" and counts.parameters(cfg) >= models.LARGE else (N, T)


def case(run: Run, model: str, N: int, T: int, mode: str) -> Case:
    """Returns the case of one model, batch and mode. If the mode ends in FULL, utterances have no padding."""
    full = mode.endswith(FULL)
    cfg = models.config(model)
    state = functools.cache(lambda: models.weights(cfg, run.device))
    batch = functools.cache(lambda: Batch(cfg, N, T, run.device, not full))
    judged_at = judged_size(run.device, cfg, N, T)
    judged = batch if judged_at == (N, T) else functools.cache(lambda: Batch(cfg, *judged_at, run.device, not full))
    exact = models.exact(cfg, run.device)

    def runner_of(module: nn.Module, call: Model, graphs: bool = False) -> Runner:
        timed = runner(module, call, batch(), state(), run.dtype, mode.removesuffix(FULL), graphs)

        def outputs() -> dict[str, Tensor]:
            # With the timed batch this may be the first call, in which cuDNN must time its algorithms. With another
            # batch cuDNN's heuristics choose, because timing the algorithms takes long.
            with cudnn_search.off() if judged is not batch else contextlib.nullcontext():
                return answer(module, call, judged(), state(), run.dtype)

        return dataclasses.replace(timed, outputs=outputs)

    def ours(graphs: bool = False) -> Runner:
        fused = models.fused(cfg, state(), run.backend)
        return runner_of(fused, fused, graphs)

    def rival(build: Callable[[nn.Module], Model]) -> Runner:
        plain = models.eager(cfg, state())
        call = build(plain)
        return runner_of(call if isinstance(call, ChannelsLast2d) else plain, call)

    def refill(seed: int) -> None:
        for held in {id(b): b for b in (batch(), judged())}.values():
            held.refill(seed)

    mine = [Contender("jasper_fast", ours)]
    if mode == "step" and run.device.type == "cuda":
        mine.append(Contender("jasper_fast_graphed", functools.partial(ours, graphs=True)))
    return Case(
        "train",
        {"model": model, "batch": f"({N}, {cfg.encoder.in_feats}, {T})", "dtype": run.dtype_name, "mode": mode},
        [*mine, *(Contender(n, functools.partial(rival, b)) for n, b in of_batch(rivals_of(run), full).items())],
        refill=refill,
        reference=lambda: eager_answer(judged(), state(), exact, exact),
        low=(lambda: eager_answer(judged(), state(), torch.float32, run.dtype)) if exact is torch.float64 else None,
        tolerance=tolerance(precision(run.device, run.dtype), cfg),
        flops=counts.training_flops(cfg, N, T),
        nbytes=counts.training_bytes(cfg, N, T, run.dtype.itemsize),
        items=N,
        seeds=(1, 2) if judged is batch else (1,),
        needs=models.needs(cfg, TRAINS),
    )


def rivals_of(run: Run) -> dict[str, Callable[[nn.Module], Model]]:
    """Returns the builders of the rivals that `--rivals` names."""
    return choice.choose("training", run.device, run.rivals)


def of_batch(chosen: dict, full: bool) -> dict:
    """Returns the rivals for a batch: eager with and without masks if all lengths are `full`, and otherwise all chosen
    rivals except eager without masks."""
    return {n: b for n, b in chosen.items() if (n in ("eager", "eager_no_masks") if full else n != "eager_no_masks")}
