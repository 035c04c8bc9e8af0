"""`jasper-fast selfcheck`: compare every kernel with fp64 on this machine.

Runs every kernel and compares the results with fp64. The check covers every configuration that dispatch can choose on
the device (the default tiles, and those that were tuned or are in a table), in forward, backward and inference, on
small shapes and on those of Jasper 10x5. The error may be twice that of plain PyTorch at the same precision, plus an
allowance for rounding. The kernels run in a separate process, so a kernel that crashes or hangs gets a bad verdict and
the check continues.

A verdict is saved for each op, face and dtype. It is valid for one GPU, driver and versions. On a GPU, backend="auto"
uses only kernels with a good verdict. If the machine lacks something that a check needs (a compiler, memory), the
command reports it and saves no verdict. If the command is interrupted, for example by Ctrl-C, the verdicts so far are
saved. On a CPU it checks the kernels of the cpu backend, and with TRITON_INTERPRET=1 also those of the triton backend,
in Triton's interpreter.
"""

import argparse

from jasper_fast.cli import common
from jasper_fast.extras import need
from jasper_fast.options import option

END = """\
exit status: 0 if every check passed, 1 otherwise, 2 for a wrong command or if nothing could be checked.

example: jasper-fast selfcheck --device cuda:0 --quick --dtype fp16"""


OPTIONS = {
    "": [
        common.DEVICE,
        option(
            "--quick", action="store_true", help="check only few shapes, frequent tiles and one dtype; takes seconds"
        ),
        option(
            "--dtype",
            action="append",
            choices=tuple(common.DTYPES),
            metavar="D",
            help="dtype to check: fp32, fp16 or bf16; may be repeated (all, or one with --quick)",
        ),
        option("--json", action="store_true", help="print every check and the verdicts as JSON"),
        option("--no-cache", action="store_true", help="do not save the verdicts"),
        option(
            "--limit",
            type=common.positive(float),
            default=180.0,
            metavar="S",
            help="most seconds for one check, compilation included (180)",
        ),
    ],
}


def run(arguments: argparse.Namespace) -> int:
    import torch

    from jasper_fast.dispatch import tuned

    device = common.device_of(arguments.device)
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise common.UsageError(
            f"--device {arguments.device}: PyTorch sees {count} GPUs; `jasper-fast info` lists them"
        )
    return need("jasper_fast.selfcheck.show", "train").main(
        tuned.indexed(device),
        quick=arguments.quick,
        as_json=arguments.json,
        cache=not arguments.no_cache,
        dtypes=[common.DTYPES[name] for name in arguments.dtype or ()],
        seconds=arguments.limit,
    )
