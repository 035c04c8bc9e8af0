"""`jasper-fast convert`: write a checkpoint in another format.

IN may be a checkpoint of this project, of NVIDIA's Jasper for PyTorch (2019 to today) or of Lightning, a .nemo archive,
one of the pair of files that NeMo 0.x saved (encoder and decoder), or a safetensors file. OUT contains the same bits
under the names of its format, and, if the format has a place for them, the labels and the settings of the features. The
new file is written under a temporary name, read back and compared with IN, and then renamed to OUT. The report lists
the new name of each entry, and what was left out.
"""

import argparse
import dataclasses
import json

from jasper_fast.cli import common
from jasper_fast.options import option

END = """\
The training state (optimiser, loss scale, data position) is left out. OUT can start a new training with --init-from.
The formats of NVIDIA and of this project also contain the moving average, if IN has one.

example: jasper-fast convert stt_en_jasper10x5dr.nemo jasper.pt --to nvidia --config-out jasper.yaml"""

OPTIONS = {
    "": [
        option("source", metavar="IN", help="the checkpoint to read"),
        option("out", metavar="OUT", help="the file to write"),
        option("--to", required=True, choices=("jasper_fast", "nvidia", "nemo", "safetensors"), help="OUT's format"),
        option("--ema", action="store_true", help="write the moving average in place of the weights"),
        option("--config", metavar="YAML", help="model configuration, if IN has none (Jasper 10x5)"),
        option("--config-out", metavar="YAML", help="also write the configuration, in NVIDIA's format"),
        option("--report", metavar="JSON", help="also write the report as JSON, with each entry's old and new name"),
        option("--force", action="store_true", help="replace files that exist"),
    ],
}


def run(arguments: argparse.Namespace) -> None:
    from jasper_fast.inference import convert
    from jasper_fast.nn.config import JasperConfig

    convert.refuse_existing(arguments.force, *filter(None, (arguments.out, arguments.config_out, arguments.report)))
    config = JasperConfig.from_yaml(arguments.config) if arguments.config else None
    report, config = convert.convert(
        arguments.source, arguments.out, arguments.to, config=config, ema=arguments.ema, force=arguments.force
    )
    if arguments.config_out:
        common.write(arguments.config_out, convert.yaml_of(config))
    if arguments.report:
        common.write(arguments.report, json.dumps(dataclasses.asdict(report)))
    print(report)
