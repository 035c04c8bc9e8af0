"""Train Jasper with fused sub-blocks.

    python train.py --config configs/jasper_small.yaml --train-manifests train.jsonl --val-manifests dev.jsonl \\
        --output-dir runs/small --epochs 100 --batch-size 32 --ema 0.999
    python train.py ... --resume                    # continues exactly where the run was stopped or killed
    python train.py ... --init-from jasper.nemo     # fine-tunes this project's, NVIDIA's or NeMo's weights
    torchrun --nproc-per-node 8 train.py ...        # one process per GPU, or 8 on the CPU with --device cpu; with
                                                    # --max-restarts torchrun resumes after a process was killed

A step is one update of the weights. Its gradient is the mean over the --grad-accumulation micro-batches of all
processes. The output folder contains log.jsonl, tensorboard/, the last checkpoints (step_*.pt), the one with the lowest
WER (best.pt) and those of --milestones. On SIGINT and SIGTERM the run saves a checkpoint and ends. After a SIGKILL
--resume continues from the newest complete checkpoint. Defaults of the options are in parentheses.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from jasper_fast import __version__, options
from jasper_fast.data.manifest import ManifestError
from jasper_fast.dispatch.backends import BACKENDS, BackendMissing
from jasper_fast.extras import MissingExtra
from jasper_fast.kernels.precision import FP32_PRECISIONS, set_fp32
from jasper_fast.nn import checkpoint, formats, loading
from jasper_fast.nn.block import PANE_FORMS
from jasper_fast.nn.checkpoint import CheckpointError
from jasper_fast.nn.config import ConfigError, JasperConfig
from jasper_fast.nn.model import Jasper
from jasper_fast.options import option
from jasper_fast.speech.metrics import wer
from jasper_fast.training import options as training_options
from jasper_fast.training.graphed import GraphedStep
from jasper_fast.training.loop import Loop
from jasper_fast.training.randomness import seed_everything, set_rng_state, settle
from jasper_fast.training.runs import Folder, Ranks, RunError, RunLog, StopRequest, talker, training_bar
from jasper_fast.training.scale import accumulation_for, largest_batches, scan_memory
from jasper_fast.training.split import Split
from jasper_fast.training.state import Meter, TrainingState
from jasper_fast.training.step import AMP_DTYPES, BufferGuard, StepResult, compiled, missed_step, train_step
from jasper_fast.training.validate import heard, validate_state

OPTIONS = {
    "data and model": [
        option("--config", required=True, metavar="YAML", help="describes model, labels, features, augmentation"),
        option("--train-manifests", nargs="+", required=True, metavar="FILE", help="JSON lines or NVIDIA's JSON array"),
        option("--val-manifests", nargs="+", default=[], metavar="FILE", help="data to validate on (none)"),
        option("--data-dir", metavar="DIR", help="folder where relative paths start (each manifest's own)"),
        option("--init-from", metavar="CKPT", help="checkpoint whose weights training starts from"),
        option("--init-ema", action="store_true", help="start from the moving average in CKPT, not its weights"),
        option("--init-decoder", choices=loading.DECODERS, default="auto",
               help="decoder rows to take from CKPT; auto: those of labels that --config has too; keep: all; new: none "
                    "(auto)"),
        option("--init-map", nargs="+", default=[], metavar="NEW=OLD",
               help="start the decoder row of the label NEW from that of the label OLD in CKPT"),
        option("--freeze-encoder", action="store_true", help="train only the decoder"),
    ],
    "length of the run; the first limit reached ends it": training_options.length(),
    "batches of each process": [
        option("--batch-size", type=int, help="utterances per micro-batch (16, without --batch-seconds)"),
        option("--batch-seconds", type=float, help="padded seconds of audio per micro-batch"),
        option("--grad-accumulation", type=int, default=1, metavar="N", help="micro-batches per step (1)"),
        option("--global-batch", type=int, metavar="N",
               help="utterances per step, over all processes; sets --grad-accumulation"),
        option("--no-bucketing", action="store_true", help="do not group utterances of similar length"),
        option("--num-workers", type=int, default=0,
               help="processes that read audio; with 0 the training process reads it (0)"),
    ],
    "optimisation": training_options.optimisation(),
    "machine": [
        option("--device", default="auto", help="device to train on: auto, cpu, cuda or cuda:1 (auto)"),
        option("--backend", choices=BACKENDS, default="auto",
               help="kernels to use; it is an error if they cannot run here (auto)"),
        option("--panes", choices=PANE_FORMS, default="auto",
               help="how to get the batch statistics of the dense residual: from Gram matrices of its inputs, or from "
                    "the outputs of its convs (auto: gram on a GPU)"),
        training_options.AMP,
        option("--fp32-precision", choices=FP32_PRECISIONS,
               help="precision of fp32 products on a GPU (default: PyTorch's, tf32 in convs, ieee elsewhere)"),
        training_options.SEED,
        option("--cuda-graphs", action="store_true",
               help="launch a whole step as one CUDA graph, from the second step of each batch shape on"),
        option("--compile", action="store_true",
               help="run the model through torch.compile; run `jasper-fast tune` first"),
        option("--deterministic", action="store_true", help="make repeated runs on a GPU bit-equal; slower"),
        option("--cudnn-benchmark", action="store_true", help="let cuDNN time its algorithms for each batch shape"),
    ],
    "output": [
        option("--output-dir", required=True, metavar="DIR", help="folder for logs and checkpoints"),
        *training_options.OUTPUT,
        option("--milestones", type=int, nargs="*", default=[], metavar="EPOCH",
               help="epochs whose checkpoints are kept for good"),
    ],
}  # fmt: skip


def arguments(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add(parser, OPTIONS)
    args = parser.parse_args(argv)
    if args.batch_size is None and args.batch_seconds is None:
        args.batch_size = 16
    faults = (
        (not args.init_from and (args.init_ema or args.init_map or args.init_decoder != "auto"),
         "--init-ema, --init-map and --init-decoder need --init-from"),
        (args.deterministic and args.cudnn_benchmark,
         "--cudnn-benchmark chooses algorithms by time, which --deterministic forbids: drop one of them"),
        (args.compile and args.cuda_graphs,
         "--compile and --cuda-graphs cannot be combined: use the one that is faster for you"),
        (args.reload_best is not None and not args.val_manifests,
         "--reload-best needs --val-manifests, because validation finds the best weights"),
    )  # fmt: skip
    if fault := training_options.wrong(args, ("grad_accumulation", "global_batch"), faults):
        parser.error(fault)
    return args


def load_data(args: argparse.Namespace, config: JasperConfig, ranks: Ranks, console: Any) -> tuple[Split, Split | None]:
    """Returns the training split, and the validation split or None."""
    common = {
        "data_dir": args.data_dir, "seed": args.seed, "workers": args.num_workers, "rank": ranks.rank,
        "world_size": ranks.world, "batch_size": args.batch_size, "max_seconds": args.batch_seconds,
    }  # fmt: skip
    train = Split.load("training", args.train_manifests, config, **common, bucketing=not args.no_bucketing)
    val = Split.load("validation", args.val_manifests, config, **common, training=False) if args.val_manifests else None
    for split in filter(None, (train, val)):
        split.frontend.to(ranks.device)
        console.print("\n".join([str(split), *split.newly_skipped()]))
    if args.global_batch:
        args.grad_accumulation, message = accumulation_for(args.global_batch, train.sampler, len(train.dataset))
        console.print(message)
    return train, val


def make_state(args: argparse.Namespace, config: JasperConfig, ranks: Ranks) -> TrainingState:
    """Makes the model, optimiser, loss scaler, meter and moving average."""
    core = Jasper(config, backend=args.backend, panes=args.panes).to(ranks.device)
    if args.init_from:
        weights = formats.read_weights(args.init_from, ema=args.init_ema)
        like = dict(loading.label_pair(pair) for pair in args.init_map)
        loading.load_weights(core, weights, labels=config.labels, strict=False, decoder=args.init_decoder, like=like)
    if args.freeze_encoder:
        core.freeze_encoder()
    optimizer, ema = training_options.make_learner(args, core, args.backend)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=args.amp == "fp16")
    return TrainingState(core, optimizer, scaler, Meter(args.max_bad_steps), ema)


def distributed(core: nn.Module, ranks: Ranks) -> nn.Module:
    """Returns `core` wrapped in DistributedDataParallel, or `core` itself if there is only one process.

    Gradients are views of the communication buckets, so they need not be copied. `static_graph` is not used: it would
    only skip the search for unused parameters, which is off anyway. With torch 2.13 it fails an internal assertion if
    the first step accumulates gradients under `no_sync`.
    """
    if ranks.world == 1:
        return core
    places = [ranks.device.index] if ranks.on_gpu else None
    known = inspect.signature(DistributedDataParallel).parameters
    # No broadcast of buffers in every forward: `Ranks.same_buffers` does it before validation and checkpoints. The
    # option has another name since torch 2.13.
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(core, device_ids=places, gradient_as_bucket_view=True, **{buffers: False})


def resume(
    args: argparse.Namespace, folder: Folder, state: TrainingState, train: Split, ranks: Ranks, console: Any
) -> Any:
    """Loads the newest checkpoint of `folder` into `state`. Returns the saved state of the random generators, or None
    for a new run or another number of processes."""
    if folder.candidates() and not args.resume:
        raise RunError(
            f"{folder.path} holds checkpoints of an earlier run: add --resume or choose another --output-dir"
        )
    found = folder.latest(console.print) if args.resume else None
    folder.clean()
    if found is None:
        return None
    path, saved = found
    kind, instead = saved["arguments"]["optimizer"], f"or start anew: --init-from {path} --output-dir elsewhere"
    if kind != args.optimizer:
        raise RunError(f"{path} was trained with --optimizer {kind}: use that one, {instead}")
    if list(saved.get("labels", ())) != list(train.dataset.vocabulary.labels):
        raise RunError(
            f"{path} was trained with other labels than those of {args.config}: use its own configuration, {instead}"
        )
    try:
        state.load_state_dict(saved)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"{path} does not fit the model of {args.config}: use its own configuration, {instead} "
            f"({str(error).splitlines()[0]})"
        ) from error
    for key, value in saved["arguments"].items():
        if getattr(args, key, None) != value and key not in ("resume", "output_dir"):
            console.print(f"note: --{key.replace('_', '-')} was {value}, now it is {getattr(args, key, 'gone')}")
    if args.amp == "fp16" and not saved["scaler"]:
        console.print("note: the checkpoint has no loss scale, so it starts at its initial value")
    if note := train.go_on(state, saved, args.grad_accumulation):
        console.print(f"note: {note}")
    console.print(f"resuming from {path}: epoch {state.epoch + 1}, step {state.step}")
    if len(saved["rng"]) != ranks.world:
        console.print(
            f"note: saved by {len(saved['rng'])} processes, resumed by {ranks.world}: random numbers will differ"
        )
        return None
    return saved["rng"][ranks.rank]


STEP = (
    "loss {loss:.3f}, WER {wer:.1%}, lr {lr:.2e}, grad norm {grad_norm:.3g}, {utterances_per_s:.1f} utterances/s, "
    "{waited_s:.1f} s waited for data"
)


@dataclasses.dataclass
class Run(Loop):
    """A run that trains Jasper. `val` is the validation split or None."""

    train: Split

    best, best_text = "best_wer", "WER {:.2%}"

    def epoch_steps(self) -> int:
        return self.train.steps(self.state.epoch, self.args.grad_accumulation)

    def tell_step(self, result: StepResult, lr: float, epoch: int, epochs: float) -> str:
        """Logs the figures since the last call, and returns the progress bar's text."""
        vocabulary, state = self.train.dataset.vocabulary, self.state
        rate = wer(result.texts, heard(result.log_probs, result.lengths, vocabulary)) if result.texts else math.nan
        figures = state.meter.figures() | {"lr": lr, "epoch": epochs, "wer": rate, "minutes": state.minutes}
        figures["waited_s"] = self.train.wait.take()
        self.log.write(state.step, "train", **figures)
        self.console.print(f"step {state.step}: {STEP.format(**figures)}")
        return f"epoch {epoch}, loss {figures['loss']:.3f}"

    def judge(self) -> None:
        """Validates, and saves the state as best.pt if the WER (that of the moving average, if there is one) is the
        lowest so far."""
        args, val, state, log = self.args, self.val, self.state, self.log
        results = validate_state(
            state, self.ranks, val.frontend, val.batches, val.dataset.vocabulary, AMP_DTYPES[args.amp], args.seed,
            stopped=lambda: bool(self.stop.signal),
        )  # fmt: skip
        if self.broken_off(results):
            return
        for weights, r in results.items():
            log.write(state.step, f"val_{weights}", loss=r.loss, wer=r.wer, cer=r.cer, minutes=state.minutes)
            self.console.print(f"validation, {weights}: WER {r.wer:.2%}, CER {r.cer:.2%}, loss {r.loss:.3f}")
            for culprit in r.bad[:5]:
                self.console.print(f"  {culprit}")
        for said, got in r.examples:
            self.console.print(f"  said {said!r}\n   got {got!r}")
        self.keep_best(r.wer)

    def end_epoch(self) -> None:
        """Prints up to five of the files that could not be used since the last call."""
        if lines := self.train.newly_skipped():
            talker().print(*lines, sep="\n")

    def finish(self, stopped: bool) -> None:
        self.tell_skipped()
        self.end_epoch()
        if len(self.train.dataset.skipped):
            self.console.print(f"training data: {self.train.dataset.skipped}")
        super().finish(stopped)


def prepare(args: argparse.Namespace, stop: StopRequest) -> tuple[nn.Module, Run, Any]:
    """Returns the wrapped model, the new or resumed run, and the saved state of the random generators or None."""
    ranks = Ranks.start(args.device)
    console = talker(quiet=not ranks.first)
    seed_everything(args.seed)
    settle(args.deterministic, args.cudnn_benchmark)
    set_fp32(args.fp32_precision)
    with ranks.together():
        config = JasperConfig.from_yaml(args.config)
        train, val = load_data(args, config, ranks, console)
        state = make_state(args, config, ranks)
        per_epoch = train.steps(0, args.grad_accumulation)
        seed_everything(args.seed + ranks.rank)  # so that noise and dropout differ between processes
        folder = Folder(args.output_dir, args.keep, args.milestones)
        generators = resume(args, folder, state, train, ranks, console)
        called = compiled(state.model, ranks.device) if args.compile else state.model
    if len(set(ranks.gather(state.step))) > 1:
        raise RunError(f"the processes found different checkpoints: all machines must share the folder {folder.path}")
    if train.changed:  # with other batches an epoch has another number of steps
        ends = state.step - state.position + train.steps(state.epoch, args.grad_accumulation)
        state.extra = ends - (state.epoch + 1) * per_epoch
    schedule = training_options.make_schedule(args, per_epoch, state.extra)
    with ranks.together():
        if ranks.on_gpu and state.step < schedule.total_steps:
            # if memory is too small, fail now and not in the middle of an epoch
            epoch = state.epoch + 1  # always a whole epoch; a resumed run may have only the rest of the present one
            largest = largest_batches(train.sampler, train.dataset.durations(epoch), epoch)
            console.print(scan_memory(called, train.frontend, largest, ranks.device, AMP_DTYPES[args.amp]))
        log = RunLog(folder.path, state.step, enabled=ranks.first)
    versions = {"jasper_fast": __version__, "torch": str(torch.__version__), "python": sys.version.split()[0]}
    about = {
        "format": checkpoint.FORMAT, "config": config.to_dict(), "labels": train.dataset.vocabulary.labels,
        "versions": versions, "arguments": vars(args), "data": train.print_of_data(),
    }  # fmt: skip
    log.write(state.step, "start", device=ranks.place, processes=ranks.world, arguments=vars(args), versions=versions)
    size, total = sum(p.numel() for p in state.model.parameters()), schedule.total_steps
    console.print(f"{size:,} parameters on {ranks.place}, {schedule.steps_per_epoch} steps per epoch, {total} in all")
    run = Run(
        args, ranks, console, state, schedule, folder, about, stop, log, state.step, state.step, train=train, val=val
    )
    return distributed(called, ranks), run, generators


def main(args: argparse.Namespace, stop: StopRequest, watch: Callable[[TrainingState], None] | None = None) -> None:
    """Trains a model. A signal in `stop` ends the run early. `watch` is called after each step."""
    model, run, generators = prepare(args, stop)
    state, train, ranks, console = run.state, run.train, run.ranks, run.console
    total = run.schedule.total_steps
    with contextlib.closing(run.log), training_bar(console, state.step, total) as progress, run.saved():
        model.train(), train.frontend.train()
        guard, stopped = BufferGuard(state.model), False
        how = {
            "model": model, "frontend": train.frontend, "optimizer": state.optimizer, "scaler": state.scaler,
            "guard": guard, "device": ranks.device, "amp_dtype": AMP_DTYPES[args.amp], "clip_norm": args.clip_norm,
            "ema": state.ema,
        }  # fmt: skip
        step = GraphedStep(**how, say=console.print) if args.cuda_graphs else functools.partial(train_step, **how)
        steps = train.micro_batches(state, args.grad_accumulation, ranks.device, stopped=lambda: bool(stop.signal))
        if generators:
            set_rng_state(generators)
        if state.unjudged:
            run.judge()
        while state.step < total:
            batches, late = next(steps), state.minutes >= (args.max_minutes or math.inf)
            readable = [batch for batch in batches if len(batch)]
            stopped, late, unread = ranks.vote(bool(stop.signal), late, not readable)
            if stopped or late:
                break
            lr = run.set_learning_rate()
            # if a process could read no file, all of them skip the step
            result = missed_step(ranks.device, batches) if unread else step(batches=readable)
            run.count(result, lr, progress, watch)  # also logs, validates and saves checkpoints that are due
        run.finish(stopped)


def command(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status. A user's mistake is reported in one line, never as a
    traceback."""
    args, stop = arguments(argv, argv and "jasper-fast train"), StopRequest()
    try:
        main(args, stop)
        return 0
    except (RunError, CheckpointError, ConfigError, ManifestError, BackendMissing, MissingExtra, MemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
    except RuntimeError as error:
        if not checkpoint.no_memory(error):
            raise
        advice = "Lower --batch-size or --batch-seconds, and raise --grad-accumulation by the same factor"
        print(f"error: {error}\n{advice}", file=sys.stderr)
    finally:
        stop.restore()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 1


if __name__ == "__main__":
    sys.exit(command())
