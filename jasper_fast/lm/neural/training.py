"""Trains a neural language model, with the optimisers, mixed precision, averages and checkpoints of acoustic models.

The text is cut into rows that are read side by side. A step is one update with a segment of each row. The output
folder has log.jsonl, tensorboard/, the last checkpoints (step_*.pt) and, with a validation text, the checkpoint with
the best perplexity (best.pt).
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jasper_fast import __version__
from jasper_fast.kernels.precision import set_fp32
from jasper_fast.lm.arpa import LanguageModelError
from jasper_fast.lm.neural import stream
from jasper_fast.lm.neural.config import LMConfig, cutoffs
from jasper_fast.lm.neural.model import TransformerXL
from jasper_fast.lm.neural.scoring import NeuralLM, figures
from jasper_fast.lm.neural.stream import Held, Stream
from jasper_fast.lm.neural.tokens import Tokens
from jasper_fast.lm.texts import TextFile
from jasper_fast.nn import checkpoint
from jasper_fast.training import options
from jasper_fast.training.loop import Loop
from jasper_fast.training.randomness import own_randomness, seed_everything, set_rng_state
from jasper_fast.training.runs import Folder, Ranks, RunError, RunLog, StopRequest, talker, training_bar
from jasper_fast.training.state import Meter, TrainingState
from jasper_fast.training.step import AMP_DTYPES, BufferGuard, StepResult, batch_loss, finish

ADVICE = ("Lower the learning rate, lengthen the warm-up, lower --clip-norm, or use bf16 or fp32", "")
STEP = "perplexity {perplexity:.2f}, lr {lr:.2e}, grad norm {grad_norm:.3g}, {tokens_per_s:.0f} tokens/s"
# Options that must be the same in a resumed run.
_FIXED = ("batch_size", "segment", "vocabulary", "seed", "optimizer", "characters", "lower_case", "join_lines")


@dataclass
class LMState(TrainingState):
    """The state that a checkpoint stores, including the model's memory of each row."""

    memory: Held | None = None
    best_perplexity: float = math.inf

    _PARTS = (*TrainingState._PARTS, "memory")
    _PLACES = tuple("best_perplexity" if name == "best_wer" else name for name in TrainingState._PLACES)


@dataclass
class LMRun(Loop):
    """A training run of a language model. ``val`` has the token rows of the validation text."""

    text: Stream
    scorer: NeuralLM

    best, best_text = "best_perplexity", "perplexity {:.2f}"

    def epoch_steps(self) -> int:
        return self.text.steps

    def end_epoch(self) -> None:
        self.state.memory.forget()

    def tell_step(self, result: StepResult, lr: float, epoch: int, epochs: float) -> str:
        state, found = self.state, self.state.meter.figures()
        found["tokens_per_s"] = found.pop("utterances_per_s") * self.text.length
        perplexity = math.exp(min(found["loss"], 700.0))
        found |= {"perplexity": perplexity, "lr": lr, "epoch": epochs, "minutes": state.minutes}
        self.log.write(state.step, "train", **found)
        self.console.print(f"step {state.step}: {STEP.format(**found)}")
        return f"epoch {epoch}, perplexity {perplexity:.2f}"

    def judge(self) -> None:
        """Measures the perplexity of the validation text with the weights and, if there is one, with their moving
        average. The average's perplexity then decides about best.pt."""
        state, results = self.state, {}
        for weights in ("live", "ema") if state.ema else ("live",):
            averaged = state.ema.applied_to(state.model) if weights == "ema" else contextlib.nullcontext()
            with own_randomness(self.args.seed), averaged:
                scores = self.scorer.log_probs(self.val, stopped=lambda: bool(self.stop.signal))
            results[weights] = figures(self.val, scores) if scores else None
        if self.broken_off(None if None in results.values() else results):
            return
        for weights, found in results.items():
            self.log.write(state.step, f"val_{weights}", perplexity=found.value, known=found.known)
            self.console.print(f"validation, {weights}: perplexity {found.value:.2f}, {found.unknown} unknown words")
        self.keep_best(found.value)


def train_step(
    state: LMState,
    tokens: Tensor,
    names: Sequence[str],
    guard: BufferGuard,
    amp_dtype: torch.dtype | None = None,
    clip_norm: float = 0.0,
) -> StepResult:
    """Makes one update on tokens (N, L + 1), which follow those that ``state.memory`` holds. If the gradient has a NaN
    or an infinity, the weights do not change. If a loss is NaN or infinite, the memory does not change either."""
    model, held = state.model, state.memory
    guard.remember()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(tokens.device.type, amp_dtype or torch.float32, enabled=amp_dtype is not None):
        hidden, memory = model(tokens[:, :-1], held.memory)
        each = -model.log_probs(hidden, tokens[:, 1:]).mean(1)
    state.scaler.scale(batch_loss(each)).backward()
    held.take(memory)
    each = each.detach()
    norm = finish(model, [each], state.optimizer, state.scaler, guard, clip_norm, state.ema)
    nothing = torch.zeros(0, device=each.device)
    return StepResult([each], [torch.ones_like(each, dtype=torch.bool)], list(names), norm, nothing, nothing, [])


def make_config(args: argparse.Namespace, tokens: Tokens) -> LMConfig:
    """Returns the model's configuration that the options describe. Raises ValueError naming an impossible setting."""
    return LMConfig(
        vocabulary=len(tokens),
        characters=args.characters,
        lower_case=args.lower_case,
        joined=args.join_lines,
        layers=args.layers,
        width=args.width,
        heads=args.heads,
        inner=4 * args.width if args.inner is None else args.inner,
        dropout=args.dropout,
        memory=args.memory,
        cutoffs=() if args.characters or args.plain_softmax else cutoffs(len(tokens)),
    )


def read_texts(
    args: argparse.Namespace, folder: Path, saved: dict[str, Any] | None, console: Any, stop: StopRequest
) -> tuple[Tokens, Stream]:
    """Returns the vocabulary (of the checkpoint ``saved`` if there is one) and the stream of the texts."""
    texts = [TextFile(path, args.characters, args.lower_case) for path in args.texts]
    total = sum(text.size for text in texts)
    with training_bar(console, 0, total) as show:

        def progress(what: str, done: int) -> None:
            show(done, what)
            if stop.signal:
                raise RunError(f"stopped by {stop.signal} while the texts were read")

        if saved:
            tokens = Tokens(saved["names"], args.characters, args.lower_case)
        else:
            tokens = Tokens.count(texts, args.vocabulary, partial(progress, "counting"))
        folder.mkdir(parents=True, exist_ok=True)
        found = stream.write(texts, tokens, folder, partial(progress, "reading"))
        show(total, "reading")
    text = Stream(found[0], args.batch_size, args.segment, args.seed, found[1])
    if not text.steps:
        raise RunError(
            f"{', '.join(args.texts)}: {len(found[0])} tokens in all, too few for a step of --batch-size "
            f"{args.batch_size} x --segment {args.segment}: lower these, or give more text"
        )
    return tokens, text


def resume(args: argparse.Namespace, state: LMState, path: Path, saved: dict[str, Any], text: Stream) -> tuple:
    """Loads a checkpoint into ``state``. Returns the state of the random generators, and notes on changed options.
    Raises RunError if the checkpoint does not fit."""
    then, instead = saved["arguments"], "or choose another --out to start anew"
    for name in _FIXED:
        if then.get(name) != getattr(args, name):
            raise RunError(f"{path}: --{name.replace('_', '-')} was {then.get(name)}: use that value again, {instead}")
    if saved["data"] != text.fingerprint:
        raise RunError(f"{path} was trained on another text ({saved['data']}, now {text.fingerprint}): give that "
                       f"text again, {instead}")  # fmt: skip
    try:
        state.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError) as error:
        raise RunError(f"{path} has a model that differs from what the options describe: give its options again, "
                       f"{instead} ({str(error).splitlines()[0]})") from error  # fmt: skip
    now = _settings(args)
    changed = [name for name, value in then.items() if now.get(name) != value and name not in ("resume", "out")]
    return saved["rng"][0], [f"note: --{n.replace('_', '-')} was {then[n]}, now it is {now.get(n)}" for n in changed]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options as checkpoints and logs store them."""
    return {name: value for name, value in vars(args).items() if not callable(value)}


def prepare(args: argparse.Namespace, stop: StopRequest) -> tuple[LMRun, Any]:
    """Returns the run, and the state of the random generators if the run is resumed (otherwise None)."""
    ranks = Ranks.start(args.device)
    if ranks.world > 1:
        raise RunError("a language model trains in one process; start the command without torchrun")
    console, folder = talker(quiet=args.quiet), Folder(args.out, args.keep)
    if args.threads:
        torch.set_num_threads(args.threads)
    set_fp32(args.fp32_precision)
    if folder.candidates() and not args.resume:
        raise RunError(f"{folder.path} holds checkpoints of an earlier run: add --resume or choose another --out")
    found = folder.latest(console.print) if args.resume else None
    folder.clean()
    if found and "language_model" not in found[1]:
        raise RunError(f"{found[0]} holds no language model; choose another --out")
    # This comes before the long work, so that a missing file is reported early.
    val = TextFile(args.val, args.characters, args.lower_case) if args.val else None
    tokens, text = read_texts(args, folder.path, found and found[1], console, stop)
    seed_everything(args.seed)
    config = make_config(args, tokens)
    model = TransformerXL(config).to(ranks.device)
    optimizer, ema = options.make_learner(args, model)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=args.amp == "fp16")
    state = LMState(model, optimizer, scaler, Meter(args.max_bad_steps, ADVICE), ema,
                    memory=Held(config, args.batch_size).to(ranks.device))  # fmt: skip
    generators = None
    if found:
        generators, notes = resume(args, state, *found, text)
        console.print(*notes, f"resuming from {found[0]}: epoch {state.epoch + 1}, step {state.step}", sep="\n")
    schedule, log = options.make_schedule(args, text.steps), RunLog(folder.path, state.step)
    scorer = NeuralLM(model, tokens)
    settings = _settings(args)
    versions = {"jasper_fast": __version__, "torch": str(torch.__version__), "python": sys.version.split()[0]}
    about = {"format": checkpoint.FORMAT, "language_model": vars(config), "names": tokens.names,
             "versions": versions, "arguments": settings, "data": text.fingerprint}  # fmt: skip
    log.write(state.step, "start", device=ranks.place, arguments=settings, versions=versions)
    kind = "characters" if tokens.characters else "words"
    console.print(f"{text.fingerprint}; {len(tokens) - 2} {kind}; "
                  f"{sum(p.numel() for p in model.parameters()):,} parameters on {ranks.place}; "
                  f"{schedule.steps_per_epoch} steps per epoch, {schedule.total_steps} in all")  # fmt: skip
    return LMRun(args, ranks, console, state, schedule, folder, about, stop, log, state.step, state.step,
                 text=text, val=scorer.rows(val) if val else [], scorer=scorer), generators  # fmt: skip


def main(args: argparse.Namespace, stop: StopRequest, watch: Callable[[LMState], None] | None = None) -> None:
    """Trains a language model. ``stop`` can end the run early, and ``watch`` is called after each step. Raises
    RunError, LanguageModelError, CheckpointError, MissingExtra or ValueError, each saying what is wrong."""
    run, generators = prepare(args, stop)
    state, total, device = run.state, run.schedule.total_steps, run.ranks.device
    with contextlib.closing(run.log), training_bar(run.console, state.step, total) as progress, run.saved():
        guard, stopped = BufferGuard(state.memory), False
        if generators:
            set_rng_state(generators)
        if state.unjudged:
            run.judge()
        state.model.train()
        while state.step < total:
            stopped = bool(stop.signal)
            if stopped or state.minutes >= (args.max_minutes or math.inf):
                break
            lr = run.set_learning_rate()
            tokens = run.text.segment(state.epoch, state.position).to(device, non_blocking=True)
            names = run.text.names(state.epoch, state.position)
            result = train_step(state, tokens, names, guard, AMP_DTYPES[args.amp], args.clip_norm)
            run.count(result, lr, progress, watch)
        run.tell_skipped()
        run.finish(stopped)


def train(args: argparse.Namespace) -> None:
    """Runs the command; on SIGINT or SIGTERM it saves and ends. Raises LanguageModelError, CheckpointError,
    MissingExtra or ValueError, each with a one-line message."""
    if fault := options.wrong(args, ("batch_size", "segment", "vocabulary", "threads")):
        raise ValueError(fault)
    stop = StopRequest()
    try:
        main(args, stop)
    except (RunError, MemoryError) as error:
        raise LanguageModelError(str(error)) from None
    except RuntimeError as error:
        if not checkpoint.no_memory(error):
            raise
        raise LanguageModelError(f"out of memory; lower --batch-size or --segment ({error})") from None
    finally:
        stop.restore()
