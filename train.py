"""Train Jasper with fused sub-blocks.

    python train.py --config configs/jasper_small.yaml --train-manifests train.jsonl --val-manifests dev.jsonl \\
        --output-dir runs/small --epochs 100 --batch-size 32 --ema 0.999
    python train.py ... --resume                    # goes on exactly where the run was stopped or killed
    python train.py ... --init-from jasper.nemo     # fine-tunes this project's, NVIDIA's or NeMo's weights
    torchrun --nproc-per-node 8 train.py ...        # one process per GPU, or per --device cpu

A step is one update of the weights, by the mean gradient over processes x --grad-accumulation micro-batches.
The output folder holds log.jsonl, tensorboard/, the last checkpoints (step_*.pt), the best one by WER (best.pt) and
milestones. SIGINT and SIGTERM save and end the run; after a SIGKILL --resume takes the newest checkpoint that is whole.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import os
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn.parallel import DistributedDataParallel

from jasper_fast import __version__
from jasper_fast.data.batches import BatchPlan, load_batches
from jasper_fast.data.dataset import SpeechDataset
from jasper_fast.data.manifest import ManifestError
from jasper_fast.dispatch.backends import BACKENDS, BackendMissing
from jasper_fast.nn import checkpoint, formats, loading
from jasper_fast.nn.block import PANE_FORMS
from jasper_fast.nn.checkpoint import CheckpointError
from jasper_fast.nn.config import ConfigError, JasperConfig
from jasper_fast.nn.model import Jasper
from jasper_fast.speech import augment
from jasper_fast.speech.decoding import greedy_decode
from jasper_fast.speech.features import LogMelFeatures
from jasper_fast.speech.metrics import wer
from jasper_fast.speech.text import Vocabulary
from jasper_fast.training import randomness
from jasper_fast.training.ema import EMA
from jasper_fast.training.folder import Folder
from jasper_fast.training.meter import Meter
from jasper_fast.training.optim import NovoGrad
from jasper_fast.training.randomness import seed_everything
from jasper_fast.training.run_state import Run
from jasper_fast.training.runs import Ranks, RunError, RunLog, StopRequest, preparing
from jasper_fast.training.schedules import POLICIES, Schedule
from jasper_fast.training.step import AMP_DTYPES, BufferGuard, Frontend, train_step
from jasper_fast.training.validate import validate_run


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    g = parser.add_argument_group("data and model")
    g.add_argument("--config", required=True, metavar="YAML", help="model, labels, features, augmentation")
    g.add_argument("--train-manifests", nargs="+", required=True, metavar="FILE", help="JSON lines or the reference's")
    g.add_argument("--val-manifests", nargs="+", default=[], metavar="FILE", help="no validation without")
    g.add_argument("--data-dir", metavar="DIR", help="root of the audio paths (each manifest's folder)")
    g.add_argument("--init-from", metavar="CKPT", help="start from these weights; other labels get a new decoder")
    g.add_argument("--init-ema", action="store_true", help="take the moving average of --init-from")
    g = parser.add_argument_group("length of the run; the first limit reached ends it")
    g.add_argument("--epochs", type=int, default=100, help="passes over the data (100)")
    g.add_argument("--steps", type=int, help="updates of the weights; replaces --epochs")
    g.add_argument("--max-minutes", type=float, help="over all parts of a resumed run")
    g = parser.add_argument_group("batches, of each process")
    g.add_argument("--batch-size", type=int, help="utterances in a micro-batch (16, without --batch-seconds)")
    g.add_argument("--batch-seconds", type=float, help="padded seconds of audio in a micro-batch")
    g.add_argument("--grad-accumulation", type=int, default=1, metavar="N", help="micro-batches in a step (1)")
    g.add_argument("--no-bucketing", action="store_true", help="mix lengths within a batch")
    g.add_argument("--num-workers", type=int, default=0, help="processes that read audio; 0 reads in the training one")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--optimizer", choices=("novograd", "adamw"), default="novograd", help="(novograd)")
    g.add_argument("--betas", type=float, nargs=2, metavar="B", help="(novograd 0.95 0, adamw 0.9 0.999)")
    g.add_argument("--weight-decay", type=float, default=1e-3, help="of all parameters (0.001)")
    g.add_argument("--clip-norm", type=float, default=0.0, help="bound on the gradient's norm (0: none)")
    g.add_argument("--lr", type=float, default=0.01, help="peak learning rate (0.01)")
    g.add_argument("--min-lr", type=float, default=1e-5, help="its floor (1e-5)")
    g.add_argument("--lr-policy", choices=POLICIES, default="exponential", help="after warm-up and hold (exponential)")
    g.add_argument("--lr-gamma", type=float, default=0.981, help="exponential: factor of an epoch (0.981)")
    g.add_argument("--lr-power", type=float, default=2.0, help="polynomial: exponent (2)")
    g.add_argument("--warmup-epochs", type=float, default=2.0, help="linear warm-up (2)")
    g.add_argument("--warmup-steps", type=int, help="replaces --warmup-epochs")
    g.add_argument("--hold-epochs", type=float, default=0.0, help="at the peak (0)")
    g.add_argument("--hold-steps", type=int, help="replaces --hold-epochs")
    g.add_argument("--ema", type=float, default=0.0, metavar="DECAY", help="moving average of the weights (0: none)")
    g.add_argument("--ema-warmup", action="store_true", help="shorter average in the first steps, for short runs")
    g.add_argument("--max-bad-steps", type=int, default=20, help="NaN or infinite steps in a row that end the run (20)")
    g = parser.add_argument_group("machine")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    g.add_argument("--backend", choices=BACKENDS, default="auto", help="kernels; asking for a missing one is an error")
    g.add_argument("--panes", choices=PANE_FORMS, default="auto", help="form of the residual; auto: gram on a GPU")
    g.add_argument("--amp", choices=tuple(AMP_DTYPES), default="off", help="mixed precision; fp16 scales the loss")
    g.add_argument("--seed", type=int, default=42, help="of weights, order, augmentation, dropout (42)")
    g.add_argument("--deterministic", action="store_true", help="bit-equal repeats on a GPU too, slower")
    g.add_argument("--cudnn-benchmark", action="store_true", help="cuDNN times its algorithms for each new batch shape")
    g = parser.add_argument_group("output")
    g.add_argument("--output-dir", required=True, metavar="DIR", help="for logs and checkpoints")
    g.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint, if there is one")
    g.add_argument("--log-every", type=int, default=25, metavar="STEPS", help="figures; a GPU is waited for then (25)")
    g.add_argument("--val-every", type=int, metavar="STEPS", help="validation (each epoch)")
    g.add_argument("--save-every", type=int, metavar="STEPS", help="checkpoint (each epoch)")
    g.add_argument("--keep", type=int, default=2, metavar="N", help="last checkpoints to keep (2)")
    g.add_argument(
        "--milestones", type=int, nargs="*", default=[], metavar="EPOCH", help="checkpoints to keep for good"
    )
    args = parser.parse_args(argv)
    if args.batch_size is None and args.batch_seconds is None:
        args.batch_size = 16
    for name in ("epochs", "steps", "grad_accumulation", "log_every", "val_every", "save_every", "keep"):
        if (getattr(args, name) or 1) < 1 or getattr(args, name) == 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.deterministic and args.cudnn_benchmark:
        parser.error("--cudnn-benchmark lets the clock choose algorithms, which --deterministic forbids: drop either")
    return args


def main(args: argparse.Namespace, stop: StopRequest) -> None:
    ranks = Ranks.start(args.device)
    device, amp_dtype = ranks.device, AMP_DTYPES[args.amp]
    console = Console(stderr=True, quiet=not ranks.first, highlight=False, markup=False, soft_wrap=True)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    seed_everything(args.seed)

    # Data
    config = JasperConfig.from_yaml(args.config)
    vocabulary = Vocabulary(config.labels)
    inputs = {"train": config.input_train, "val": config.input_val or config.input_train}
    stride = math.prod(b.s**b.repeat for b in config.encoder.blocks)
    sizes = {"batch_size": args.batch_size, "max_seconds": args.batch_seconds, "seed": args.seed}
    sizes |= {"rank": ranks.rank, "world_size": ranks.world}
    with preparing(args.config):
        features = {k: LogMelFeatures.from_config(v.get("filterbank_features", {})) for k, v in inputs.items()}
        frontend = Frontend(features["train"], augment.from_config(config.input_train)).to(device)
        val_frontend = Frontend(features["val"]).to(device)
        for kind, f in features.items():
            if f.n_mels != config.encoder.in_feats:
                raise ValueError(f"input_{kind} makes {f.n_mels} features, the encoder takes {config.encoder.in_feats}")
    common = {"data_dir": args.data_dir, "seed": args.seed, "frame_samples": features["train"].hop_length * stride}
    with preparing("training data"):
        settings = inputs["train"].get("audio_dataset")
        train_set = SpeechDataset.from_manifests(args.train_manifests, vocabulary, settings, **common)
        plan = BatchPlan(train_set.durations, **sizes, bucketing=not args.no_bucketing)
    val_set = val_plan = None
    if args.val_manifests:
        with preparing("validation data"):
            settings, common["training"] = inputs["val"].get("audio_dataset"), False
            val_set = SpeechDataset.from_manifests(args.val_manifests, vocabulary, settings, **common)
            val_plan = BatchPlan(val_set.durations, **sizes, shuffle=False)
    for name, dataset in (("training", train_set), ("validation", val_set)):
        if dataset is not None:
            hours = sum(dataset.durations(0)) / 3600
            console.print(f"{name}: {len(dataset)} utterances, {hours:.2f} hours, {dataset.skipped}")
            for item in dataset.skipped.items[:5]:
                console.print(f"  skipped: {item.detail}")
    reported = len(train_set.skipped)

    # Model and optimiser
    core = Jasper(config, backend=args.backend, panes=args.panes).to(device)
    if args.init_from:
        weights = formats.read_weights(args.init_from, ema=args.init_ema)
        loading.load_weights(core, weights, labels=vocabulary.labels, strict=False)
    model = core
    if ranks.world > 1:  # running statistics are made equal before they are used, not in every forward
        places = [device.index] if device.type == "cuda" else None
        model = DistributedDataParallel(core, device_ids=places, broadcast_buffers=False)
    settings = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "novograd":
        optimizer = NovoGrad(core.parameters(), betas=tuple(args.betas or (0.95, 0.0)), **settings)
    else:
        optimizer = torch.optim.AdamW(
            core.parameters(), betas=tuple(args.betas or (0.9, 0.999)), fused=True, **settings
        )
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    ema = EMA(core, args.ema, warmup=args.ema_warmup) if args.ema else None
    run = Run(core, optimizer, scaler, Meter(args.max_bad_steps), ema)
    guard = BufferGuard(core)
    steps_per_epoch = math.ceil(plan.steps(0) / args.grad_accumulation)
    total_steps = args.steps or args.epochs * steps_per_epoch
    schedule = Schedule(
        lr=args.lr,
        policy=args.lr_policy,
        warmup_steps=round(args.warmup_epochs * steps_per_epoch) if args.warmup_steps is None else args.warmup_steps,
        hold_steps=round(args.hold_epochs * steps_per_epoch) if args.hold_steps is None else args.hold_steps,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        gamma=args.lr_gamma,
        power=args.lr_power,
        min_lr=args.min_lr,
    )

    seed_everything(args.seed + ranks.rank)  # equal weights, but each process has noise and dropout of its own

    # Where to start, and where to write
    output = Path(args.output_dir)
    folder = Folder(output, args.keep, args.milestones)
    if folder.steps() and not args.resume:
        raise RunError(f"{output} holds checkpoints of an earlier run: add --resume or choose another --output-dir")
    rng_states = None
    if args.resume and (found := folder.latest(console.print)):
        path, state = found
        run.load_state_dict(state)
        rng_states = state["rng"]
        if len(rng_states) != ranks.world:
            console.print(
                f"note: {len(rng_states)} processes saved this, now there are {ranks.world}: not an exact resume"
            )
        for key, value in state["arguments"].items():
            if getattr(args, key, None) != value and key not in ("resume", "output_dir"):
                console.print(f"note: --{key.replace('_', '-')} was {value}, now it is {getattr(args, key, 'gone')}")
        console.print(f"resuming from {path}: epoch {run.epoch + 1}, step {run.step}")
    folder.clean()
    log = RunLog(output, run.step, enabled=ranks.first)
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = {"jasper_fast": __version__, "torch": str(torch.__version__), "python": sys.version.split()[0]}
    log.write(run.step, "start", device=place, processes=ranks.world, arguments=vars(args), versions=versions)
    parameters = sum(p.numel() for p in core.parameters())
    console.print(f"{parameters:,} parameters on {place}, {steps_per_epoch} steps an epoch, {total_steps} in all")

    clock = time.monotonic()

    def checkpoint_state() -> dict:
        """All that a checkpoint holds; every rank must ask."""
        nonlocal clock
        run.minutes, clock = run.minutes + (time.monotonic() - clock) / 60, time.monotonic()
        ranks.same_buffers(core)
        about = {"format": checkpoint.FORMAT, "versions": versions, "arguments": vars(args)}
        about |= {"config": config.to_dict(), "labels": list(vocabulary.labels)}
        return run.state_dict() | about | {"rng": ranks.gather(randomness.rng_state())}

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not ranks.first) as progress, contextlib.closing(log):
        bar = progress.add_task("training", total=total_steps, completed=run.step)
        if rng_states is not None and len(rng_states) == ranks.world:
            randomness.set_rng_state(rng_states[ranks.rank])
        ending = run.step >= total_steps
        while not ending:
            core.train(), frontend.train()
            first = run.position * args.grad_accumulation
            loader = load_batches(train_set, plan, run.epoch, first, args.num_workers, pin_memory=device.type == "cuda")
            steps_here = math.ceil(plan.steps(run.epoch) / args.grad_accumulation)
            while run.position < steps_here and not ending:
                # One step
                batches = [b for b in itertools.islice(loader, args.grad_accumulation) if len(b)]
                if not batches:
                    raise RunError(f"no file of a whole step could be read: {train_set.skipped.items[-1].detail}")
                lr = schedule(run.step)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                result = train_step(
                    model, frontend, batches, optimizer, scaler, guard,
                    device=device, amp_dtype=amp_dtype, clip_norm=args.clip_norm,
                )  # fmt: skip
                if ema:
                    ema.update(core)
                run.meter.add(result)
                run.step += 1
                run.position += 1
                progress.advance(bar)

                # What is due
                epoch_over = run.position == steps_here
                log_due = run.step % args.log_every == 0 or run.step == total_steps
                val_due = run.step % args.val_every == 0 if args.val_every else epoch_over
                save_due = run.step % args.save_every == 0 if args.save_every else epoch_over
                minutes = run.minutes + (time.monotonic() - clock) / 60
                ending = bool(stop.signal) or minutes >= (args.max_minutes or math.inf)
                if ranks.world > 1:  # together: one process may have been told to stop, the others must follow
                    ending = (log_due or val_due or save_due) and ranks.any(ending)
                ending |= run.step == total_steps
                if device.type == "cpu" or log_due or val_due or save_due or ending:
                    for culprit in (bad := run.meter.read()):
                        Console(stderr=True).print(f"step skipped: {culprit}", markup=False, soft_wrap=True)
                    if bad:
                        log.write(run.step, "skipped", names=bad)
                if log_due:
                    figures = run.meter.figures()
                    texts = greedy_decode(torch.nan_to_num(result.log_probs, nan=-1e4), result.lengths, vocabulary)
                    figures |= {
                        "lr": lr,
                        "epoch": run.epoch + run.position / steps_here,
                        "wer": wer(result.texts, texts),
                    }
                    log.write(run.step, "train", **figures)
                    progress.update(bar, description=f"epoch {run.epoch + 1}, loss {figures['loss']:.3f}")
                    console.print(
                        f"step {run.step}: loss {figures['loss']:.3f}, WER {figures['wer']:.1%}, lr {lr:.2e}, "
                        f"grad norm {figures['grad_norm']:.3g}, {figures['utterances_per_s']:.1f} utterances/s"
                    )
                if epoch_over or ending:  # files that turned out to be unusable
                    for item in train_set.skipped.items[reported : reported + 5]:
                        console.print(f"  skipped: {item.detail}")
                    reported = len(train_set.skipped)
                if epoch_over:
                    run.epoch, run.position = run.epoch + 1, 0
                if val_set and (val_due or (ending and not stop.signal)):
                    batches = functools.partial(load_batches, val_set, val_plan, workers=args.num_workers)
                    results = validate_run(run, ranks, val_frontend, batches, vocabulary, amp_dtype, args.seed)
                    for weights, r in results.items():
                        log.write(run.step, f"val_{weights}", loss=r.loss, wer=r.wer, cer=r.cer)
                        console.print(f"validation, {weights}: WER {r.wer:.2%}, CER {r.cer:.2%}, loss {r.loss:.3f}")
                        for culprit in r.bad[:5]:
                            console.print(f"  {culprit}")
                    for said, got in r.examples[:2]:
                        console.print(f"  said {said!r}\n   got {got!r}")
                    if r.wer < run.best_wer:  # of the moving average, where there is one
                        run.best_wer = r.wer
                        state = checkpoint_state()
                        if ranks.first:
                            folder.save_best(state)
                    run.meter.restart()
                if save_due or ending or (epoch_over and run.epoch in folder.milestones):
                    state = checkpoint_state()
                    if ranks.first:
                        folder.save(state)
                        if epoch_over:
                            folder.save_milestone(state, run.epoch)
                    run.meter.restart()
                if epoch_over:
                    break
    if len(train_set.skipped):
        console.print(f"training data: {train_set.skipped}")
    best = f", best WER {run.best_wer:.2%}" if run.best_wer < math.inf else ""
    how = f"stopped by {stop.signal}; go on with --resume" if stop.signal else "done"
    console.print(f"{how}: step {run.step}, {run.minutes:.1f} minutes{best}, checkpoints in {output}")


if __name__ == "__main__":
    stop = StopRequest()
    try:
        main(arguments(), stop)
    except (RunError, CheckpointError, ConfigError, ManifestError, BackendMissing) as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: {error}\nLower --batch-size or --batch-seconds, and raise --grad-accumulation as much")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
