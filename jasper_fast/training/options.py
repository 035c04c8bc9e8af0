"""Options that every training command has, and what they mean; torch is imported only where it is used."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from jasper_fast.options import Option, option
from jasper_fast.training.schedules import POLICIES, Schedule

RESTARTED = "TORCHELASTIC_RESTART_COUNT"
SEED = option("--seed", type=int, default=42, help="for weights, data order, augmentation and dropout (42)")
AMP = option(
    "--amp", choices=("off", "fp16", "bf16"), default="off", help="mixed precision; fp16 scales the loss"
)  # the keys of step.AMP_DTYPES
OUTPUT = [
    option("--resume", action="store_true", help="continue from the newest whole checkpoint, if there is one"),
    option("--log-every", type=int, default=25, metavar="STEPS", help="log figures, which waits for the GPU (25)"),
    option("--val-every", type=int, metavar="STEPS", help="validation (each epoch)"),
    option("--save-every", type=int, metavar="STEPS", help="checkpoint (each epoch)"),
    option("--keep", type=int, default=2, metavar="N", help="last checkpoints to keep (2)"),
]
COUNTS = ("epochs", "steps", "log_every", "val_every", "save_every", "keep")  # at least 1 where they are given


def length(epochs: int = 100) -> list[Option]:
    """The options for the run's length."""
    return [
        option("--epochs", type=int, default=epochs, help=f"passes over the data ({epochs})"),
        option("--steps", type=int, help="updates of the weights; replaces --epochs"),
        option("--max-minutes", type=float, help="over all parts of a resumed run"),
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
    """The options for optimiser, learning rate, moving average and bad steps, with these defaults. There is no
    `--warmup-epochs` if ``warmup_steps`` is given."""
    warmup = [option("--warmup-steps", type=int, default=warmup_steps, help=f"linear warm-up ({warmup_steps})")]
    if warmup_steps is None:
        warmup = [
            option("--warmup-epochs", type=float, default=warmup_epochs, help=f"linear warm-up ({warmup_epochs:g})"),
            option("--warmup-steps", type=int, help="replaces --warmup-epochs"),
        ]
    bound = f"{clip_norm:g}; 0: none" if clip_norm else "0: none"
    return [
        option("--optimizer", choices=("novograd", "adamw"), default=optimizer, help=f"({optimizer})"),
        option("--betas", type=float, nargs=2, metavar="B", help="(novograd 0.95 0, adamw 0.9 0.999)"),
        option("--weight-decay", type=float, default=weight_decay, help=f"of all parameters ({weight_decay:g})"),
        option("--clip-norm", type=float, default=clip_norm, help=f"bound on the gradient's norm ({bound})"),
        option("--lr", type=float, default=lr, help=f"peak learning rate ({lr:g})"),
        option("--min-lr", type=float, default=1e-5, help="lowest learning rate (1e-5)"),
        option("--lr-policy", choices=POLICIES, default=policy, help=f"after warm-up and hold ({policy})"),
        option("--lr-gamma", type=float, default=0.981, help="exponential: factor per epoch (0.981)"),
        option("--lr-power", type=float, default=2.0, help="polynomial: exponent (2)"),
        *warmup,
        option("--hold-epochs", type=float, default=0.0, help="at the peak, after warm-up (0)"),
        option("--hold-steps", type=int, help="replaces --hold-epochs"),
        option("--lr-by-clock", action="store_true", help="reach the schedule's end with --max-minutes, if earlier"),
        option("--ema", type=float, default=0.0, metavar="DECAY", help="moving average of the weights (0: none)"),
        option("--ema-warmup", action="store_true", help="shorter average in the first steps, for short runs"),
        option("--max-bad-steps", type=int, default=20, help="NaN or infinite steps in a row that end the run (20)"),
        option("--reload-best", type=int, nargs="?", const=0, metavar="N",
               help="return to the best weights instead of ending so, and after N validations without improvement"),
    ]  # fmt: skip


def wrong(args: argparse.Namespace, counts: Sequence[str] = COUNTS) -> str | None:
    """What is wrong with the options, in words. Sets `resume` where torchrun has started the run again."""
    for name in counts:
        if (value := getattr(args, name)) is not None and value < 1:
            return f"--{name.replace('_', '-')} must be at least 1"
    if int(os.environ.get(RESTARTED, 0)):  # torchrun --max-restarts started this again
        args.resume = True
    if (args.reload_best or 0) < 0:
        return "--reload-best must not be negative"
    if args.lr_by_clock and not args.max_minutes:
        return "--lr-by-clock needs --max-minutes"
    return None


def make_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Schedule:
    """The learning rate that the options ask for."""
    return Schedule(
        lr=args.lr,
        policy=args.lr_policy,
        warmup_steps=round(args.warmup_epochs * steps_per_epoch) if args.warmup_steps is None else args.warmup_steps,
        hold_steps=round(args.hold_epochs * steps_per_epoch) if args.hold_steps is None else args.hold_steps,
        steps_per_epoch=steps_per_epoch,
        total_steps=args.steps or args.epochs * steps_per_epoch,
        gamma=args.lr_gamma,
        power=args.lr_power,
        min_lr=args.min_lr,
    )


def make_learner(args: argparse.Namespace, model: Any, backend: str = "auto") -> tuple[Any, Any]:
    """The optimiser of a model's trainable parameters, and the moving average (None without `--ema`)."""
    import torch

    from jasper_fast.training.ema import EMA
    from jasper_fast.training.optim import NovoGrad

    ema = EMA(model, args.ema, warmup=args.ema_warmup) if args.ema else None
    learning = [p for p in model.parameters() if p.requires_grad]
    settings = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "adamw":
        return torch.optim.AdamW(learning, betas=tuple(args.betas or (0.9, 0.999)), fused=True, **settings), ema
    return NovoGrad(learning, betas=tuple(args.betas or (0.95, 0.0)), ema=ema, backend=backend, **settings), ema
