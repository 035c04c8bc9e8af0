"""The command line: `jasper-fast COMMAND` or `python -m jasper_fast`. Subcommands are modules in this folder, except
`train`, `bench` and `demo`."""

import argparse
import os
import sys

from jasper_fast import __version__
from jasper_fast.cli import check, common, convert, evaluate, export, info, lm, selfcheck, transcribe, tune
from jasper_fast.cli.prepare import librispeech, manifest, shards
from jasper_fast.extras import MissingExtra, need

# For each command that parses its own options: its help, its module, the function there that takes the arguments, and
# the extra that the module needs.
_PASSED_ON = {
    "train": ("train or fine-tune: `train --help`", "jasper_fast.train", "command", "train"),
    "bench": ("compare speed with plain PyTorch: `bench --help`", "jasper_fast.bench.cli", "shell", "bench"),
    "demo": ("train a model on synthetic voices in a few minutes", "jasper_fast.demo.__main__", "main", "demo"),
}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="jasper-fast",
        description="Jasper speech recognition with fused kernels: transcribe, evaluate, train, benchmark.",
        epilog="`jasper-fast COMMAND --help` explains a command.",
    )
    top.add_argument("--version", action="version", version=f"jasper_fast {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common.add_modules(commands, transcribe, evaluate, check, convert, export, info, selfcheck, tune)
    about = "prepare data for training and evaluation"
    parts = commands.add_parser("prepare", help=about, description=about).add_subparsers(
        dest="part", required=True, metavar="WHAT"
    )
    common.add_modules(parts, librispeech, manifest, shards)
    lm.add(commands)
    for name, (help, *_) in _PASSED_ON.items():
        commands.add_parser(name, help=help, add_help=False)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status. A user's mistake is reported in one line, never as a
    traceback."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else ""
    try:
        if command in _PASSED_ON:
            _, module, function, extra = _PASSED_ON[command]
            return getattr(need(module, extra), function)(argv[1:])
        arguments = parser().parse_args(argv)
        return arguments.run(arguments) or 0  # None for success
    except KeyboardInterrupt:
        print("jasper-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `jasper-fast ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _expected() as error:
        print(f"jasper-fast {command}: error: {error}", file=sys.stderr)
        return 2


def _expected() -> tuple[type[BaseException], ...]:
    """Returns the exceptions whose message is meant for users."""
    from jasper_fast.dispatch import backends, probe, tuned
    from jasper_fast.nn.checkpoint import CheckpointError

    return (
        common.UsageError, MissingExtra, CheckpointError, backends.BackendMissing, probe.CannotCheck, tuned.CannotTune,
        ValueError, OSError, MemoryError,
    )  # fmt: skip
