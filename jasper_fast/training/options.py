"""The options that all training commands share. Only `make_learner` imports torch, so that `--help` is fast."""

import argparse
import os
from collections.abc import Iterable, Sequence
from typing import Any

from jasper_fast.options import Option, option
from jasper_fast.training.schedules import POLICIES, Schedule

SEED = option("--seed", type=int, default=42, help="seed of weights, data order, augmentation and dropout (42)")
# the choices are the keys of step.AMP_DTYPES
AMP = option("--amp", choices=("off", "fp16", "bf16"), default="off", help="mixed precision; fp16 scales the loss")
OUTPUT = [
    option("--resume", action="store_true", help="continue from the newest complete checkpoint, if there is one"),
    option(
        "--log-every",
        type=int,
        default=25,
        metavar="STEPS",
        help="log figures every STEPS steps, which waits for the GPU (25)",
    ),
    option("--val-every", type=int, metavar="STEPS", help="validate every STEPS steps (once per epoch)"),
    option("--save-every", type=int, metavar="STEPS", help="save a checkpoint every STEPS steps (once per epoch)"),
    option("--keep", type=int, default=2, metavar="N", help="number of latest checkpoints to keep (2)"),
]
# the lowest value of each option, if it is given
LEAST = {
    **dict.fromkeys(("epochs", "steps", "log_every", "val_every", "save_every", "keep", "max_bad_steps"), 1),
    **dict.fromkeys(("lr", "min_lr", "lr_power", "weight_decay", "clip_norm", "reload_best", "seed", "num_workers"), 0),
    **dict.fromkeys(("warmup_epochs", "warmup_steps", "hold_epochs", "hold_steps"), 0),
}
# Options whose values must be below 2**63. This refuses an infinite number of steps or epochs, and seeds from 2**64 on,
# which PyTorch does not take.
LIMITED = ("seed", "epochs", "steps", "warmup_epochs", "warmup_steps", "hold_epochs", "hold_steps")


def length(epochs: int = 100) -> list[Option]:
    return [
        option("--epochs", type=int, default=epochs, help=f"number of passes over the data ({epochs})"),
        option("--steps", type=int, help="number of updates of the weights; replaces --epochs"),
        option("--max-minutes", type=float, help="stop after this time, counted over all parts of a resumed run"),
    ]


def optimisation(
    optimizer: str = "novograd",
    lr: float = 0.01,
    weight_decay: float = 1e-3,
    policy: str = "exponential",
    warmup_epochs: float = 2.0,
    warmup_steps: int | None = None,
    clip_norm: float = 0.0,
) -> list[Option]:
    """Returns the options for optimiser, learning rate, moving average and bad steps, with these defaults.

    With a default for ``warmup_steps`` there is no option `--warmup-epochs`.
    """
    warmup = [
        option("--warmup-steps", type=int, default=warmup_steps, help=f"steps of linear warm-up ({warmup_steps})")
    ]
    if warmup_steps is None:
        warmup = [
            option("--warmup-epochs", type=float, default=warmup_epochs,
                   help=f"epochs of linear warm-up ({warmup_epochs:g})"),
            option("--warmup-steps", type=int, help="steps of linear warm-up; replaces --warmup-epochs"),
        ]  # fmt: skip
    bound = f"{clip_norm:g}; 0: no limit" if clip_norm else "0: no limit"
    return [
        option("--optimizer", choices=("novograd", "adamw"), default=optimizer, help=f"optimiser ({optimizer})"),
        option("--betas", type=float, nargs=2, metavar="B", help="decay of both moments (0.95 0; adamw: 0.9 0.999)"),
        option("--weight-decay", type=float, default=weight_decay, help=f"decay of all parameters ({weight_decay:g})"),
        option("--clip-norm", type=float, default=clip_norm, help=f"limit of the gradient's norm ({bound})"),
        option("--lr", type=float, default=lr, help=f"peak learning rate ({lr:g})"),
        option("--min-lr", type=float, default=1e-5, help="lowest learning rate (1e-5)"),
        option("--lr-policy", choices=POLICIES, default=policy, help=f"decay after warm-up and hold ({policy})"),
        option("--lr-gamma", type=float, default=0.981, help="factor per epoch of the exponential policy (0.981)"),
        option("--lr-power", type=float, default=2.0, help="exponent of the polynomial policy (2)"),
        *warmup,
        option("--hold-epochs", type=float, default=0.0, help="epochs at the peak rate, after warm-up (0)"),
        option("--hold-steps", type=int, help="steps at the peak rate; replaces --hold-epochs"),
        option("--lr-by-clock", action="store_true", help="end the schedule with --max-minutes, if that is earlier"),
        option("--ema", type=float, default=0.0, metavar="DECAY", help="decay of the averaged weights (0: none)"),
        option("--ema-warmup", action="store_true", help="average over fewer steps at first, for short runs"),
        option("--max-bad-steps", type=int, default=20,
               help="end the run after this many skipped steps in a row (20)"),
        option("--reload-best", type=int, nargs="?", const=0, metavar="N",
               help="return to the best weights after too many bad steps or N validations without improvement"),
    ]  # fmt: skip


def wrong(args: argparse.Namespace, counts: Sequence[str] = (), faults: Iterable[tuple[bool, str]] = ()) -> str | None:
    """Returns what is wrong with the options, or None. Sets `resume` if torchrun has restarted the run.

    `counts`: further options of the command that must be at least 1 or not set. `faults`: further checks of the
    command, as pairs (whether the options are wrong, message).
    """
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # restarted by `torchrun --max-restarts`
        args.resume = True
    least = LEAST | dict.fromkeys(counts, 1)
    given = [(name, value) for name, value in vars(args).items() if name in least and value is not None]
    found = (
        *((not value >= least[name], f"--{name.replace('_', '-')} must be at least {least[name]}, not {value}")
          for name, value in given),
        *((not value < 2**63, f"--{name.replace('_', '-')} must be below 2**63, not {value}")
          for name, value in given if name in LIMITED),
        (args.max_minutes is not None and not args.max_minutes > 0, "--max-minutes must be above 0"),
        (not 0 <= args.ema < 1, "--ema must be at least 0 and below 1"),
        (not all(0 <= beta < 1 for beta in args.betas or ()), "--betas must be at least 0 and below 1"),
        (not 0 < args.lr_gamma <= 1, "--lr-gamma must be above 0 and at most 1"),
        (args.lr_by_clock and args.max_minutes is None, "--lr-by-clock needs --max-minutes"),
        *faults,
    )  # fmt: skip
    return next((message for is_there, message in found if is_there), None)


def make_schedule(args: argparse.Namespace, steps_per_epoch: int, extra: int = 0) -> Schedule:
    """Returns the learning-rate schedule that the options describe. `extra`: see `TrainingState`.

    What the options give in epochs is counted without the extra steps, so that a change of the batches does not change
    the rate. What they give in steps is counted from the first step of the run.
    """
    return Schedule(
        lr=args.lr,
        policy=args.lr_policy,
        warmup_steps=round(args.warmup_epochs * steps_per_epoch) if args.warmup_steps is None else args.warmup_steps,
        hold_steps=round(args.hold_epochs * steps_per_epoch) if args.hold_steps is None else args.hold_steps,
        steps_per_epoch=steps_per_epoch,
        total_steps=args.steps or max(1, args.epochs * steps_per_epoch + extra),
        gamma=args.lr_gamma,
        power=args.lr_power,
        min_lr=args.min_lr,
        warmup_from=extra if args.warmup_steps is None else 0,
        decay_from=0 if args.steps and args.lr_policy != "exponential" else extra,
    )


def make_learner(args: argparse.Namespace, model: Any, backend: str = "auto") -> tuple[Any, Any]:
    """Returns the optimiser of a model's trainable parameters, and the moving average (None without `--ema`)."""
    import torch

    from jasper_fast.training.optim import EMA, NovoGrad

    ema = EMA(model, args.ema, warmup=args.ema_warmup) if args.ema else None
    learning = [p for p in model.parameters() if p.requires_grad]
    settings = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "adamw":
        return torch.optim.AdamW(learning, betas=tuple(args.betas or (0.9, 0.999)), fused=True, **settings), ema
    return NovoGrad(learning, betas=tuple(args.betas or (0.95, 0.0)), ema=ema, backend=backend, **settings), ema
