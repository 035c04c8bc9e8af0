"""The public interface equals the recorded one: op schemas, signatures, state-dict keys, commands, results.

`python tests/test_interface.py` records it again after an intended change.
"""

import argparse
import inspect
import json
import re
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RECORDED = Path(__file__).with_name("interface.json")


def schemas() -> list[str]:
    """Returns the schemas of the package's ops, as torch.library has them."""
    import jasper_fast.ops  # noqa: F401

    return sorted(str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("jasper_fast::"))


def signatures() -> dict[str, list[str]]:
    """Returns the parameters of the public functions and classes, by name."""
    import jasper_fast
    from jasper_fast import ops

    public = {name: getattr(jasper_fast, name) for name in jasper_fast.__all__ if name != "__version__"}
    public |= {f"ops.{name}": getattr(ops, name) for name in ops.__all__}
    return {name: list(inspect.signature(of).parameters) for name, of in public.items()}


def state_dict() -> list[str]:
    """Returns the names and shapes in the state dict of Jasper 10x5 dense residual."""
    from jasper_fast import Jasper, JasperConfig

    with torch.device("meta"):
        model = Jasper(JasperConfig.from_yaml(ROOT / "configs" / "jasper10x5dr.yaml"))
    return [f"{name} {tuple(t.shape)}" for name, t in model.state_dict().items()]


def options(name: str, parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Returns the options that --help lists, for a command and for each of its subcommands."""
    found = {name: sorted(set(re.findall(r"^ +(?:-\w, )?(--[a-z0-9-]+)", parser.format_help(), re.MULTILINE)))}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subcommand, its_parser in action.choices.items():
                found |= options(f"{name} {subcommand}", its_parser)
    return found


def commands() -> dict[str, list[str]]:
    """Returns the options of every command."""
    import train
    from jasper_fast.bench import cli as bench
    from jasper_fast.cli import command
    from jasper_fast.options import add

    training = argparse.ArgumentParser()
    add(training, train.OPTIONS)
    parsers = {"bench": bench.parser(), "jasper-fast": command.parser(), "train.py": training}
    return {name: of for top, parser in parsers.items() for name, of in options(top, parser).items()}


def result() -> dict[str, list[str]]:
    """Returns the keys of a benchmark's result: those of the machine, and those of its rows with the keys nested in
    them, except in `clocks`."""
    from bench_runs import CPU, make_run, softplus_case

    from jasper_fast.bench.harness import machine

    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder)).cases("test", [softplus_case({"eager": torch.nn.functional.softplus})])
        rows = json.loads((Path(folder) / "run.json").read_text())["rows"]
    items = [item for row in rows for item in row.items()]
    nested = {f"{key}.{inner}" for key, value in items if isinstance(value, dict) for inner in value}
    keys = nested | {key for key, _ in items}
    return {"machine": sorted(machine.describe(CPU)), "rows": sorted(k for k in keys if not k.startswith("clocks."))}


PARTS = {of.__name__: of for of in (schemas, signatures, state_dict, commands, result)}


@pytest.mark.parametrize("part", PARTS)
def test_it_is_as_recorded(part: str) -> None:
    recorded, found = json.loads(RECORDED.read_text())[part], PARTS[part]()
    assert found == recorded, f"if that is meant: python {Path(__file__).relative_to(ROOT)}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    RECORDED.write_text(json.dumps({name: of() for name, of in PARTS.items()}, indent=1) + "\n")
