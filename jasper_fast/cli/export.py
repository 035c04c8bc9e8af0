"""`jasper-fast export`: a checkpoint for other runtimes."""

from __future__ import annotations

import argparse

from jasper_fast.options import option

DESCRIPTION = """\
Writes a model as a folder for ONNX Runtime and for packages that build on it: model.onnx, with batch norm folded, for
any batch and length, and vocab.txt and config.json as onnx-asr reads them. The masks are in the graph, so an
utterance gives the same result in any batch. The folder is written only if ONNX Runtime gives the same results as the
engine, for batches, lengths and padding with which the graph was not made. Needs pip install 'jasper-fast[export]'."""
END = """\
features.json in the folder holds the settings of the features; onnx-asr itself makes those of 80 and 128 bands only.

example: jasper-fast export onnx runs/best.pt jasper-onnx"""


HELP = "a checkpoint as an ONNX model"
OPTIONS = {
    "": [
        option("format", choices=("onnx",), help="the one format"),
        option("checkpoint", metavar="CKPT", help="weights, as transcribe takes them"),
        option("folder", metavar="OUT_DIR", help="the folder to make"),
        option("--config", metavar="YAML", help="model configuration, if the checkpoint has none"),
        option("--ema", action="store_true", help="use the moving average of the weights"),
    ],
}


def run(arguments: argparse.Namespace) -> int:
    from jasper_fast.inference import export, recognizer
    from jasper_fast.nn.config import JasperConfig
    from jasper_fast.nn.loading import load_model

    config = JasperConfig.from_yaml(arguments.config) if arguments.config else None
    model = load_model(arguments.checkpoint, config=config, ema=arguments.ema)
    difference = export.export_onnx(model, recognizer.labels_of(model.config), arguments.folder)
    print(f"{arguments.folder}: log-probabilities of ONNX Runtime and the engine differ by at most {difference:.1e}")
    if not model.config.encoder.use_conv_masks:
        print("this model has no conv masks: padding counts as data, so results depend on the batch of an utterance")
    return 0
