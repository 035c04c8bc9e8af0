"""`jasper-fast export`: write a checkpoint as an ONNX model.

Writes a folder for ONNX Runtime and for packages that use it. model.onnx accepts any batch size, and any length of at
least two output frames. Batch norm is folded into the convs. vocab.txt and config.json have the form that onnx-asr
reads. If the checkpoint's model has conv masks, so has model.onnx, and the result of an utterance does not depend on
the rest of its batch. The folder is written only if ONNX Runtime and our engine agree on inputs whose batch size,
lengths and padding differ from those that were used to trace the model. Needs pip install 'jasper-fast[export]'.
"""

import argparse

from jasper_fast.options import option

END = """\
features.json in the folder has the settings of the features. onnx-asr can compute only features of 80 or 128 bands.

example: jasper-fast export onnx runs/best.pt jasper-onnx"""


OPTIONS = {
    "": [
        option("format", choices=("onnx",), help="the format to write; onnx is the only one"),
        option("checkpoint", metavar="CKPT", help="a checkpoint that `jasper-fast transcribe` reads"),
        option("folder", metavar="OUT_DIR", help="the folder to write"),
        option("--config", metavar="YAML", help="model configuration, if the checkpoint has none"),
        option("--ema", action="store_true", help="use the moving average of the weights"),
    ],
}


def run(arguments: argparse.Namespace) -> None:
    from jasper_fast.inference import export, recognizer
    from jasper_fast.nn.config import JasperConfig
    from jasper_fast.nn.loading import load_model

    config = JasperConfig.from_yaml(arguments.config) if arguments.config else None
    model = load_model(arguments.checkpoint, config=config, ema=arguments.ema)
    difference = export.export_onnx(model, recognizer.labels_of(model.config), arguments.folder)
    print(f"{arguments.folder}: log-probabilities of ONNX Runtime and the engine differ by at most {difference:.1e}")
    if not model.config.encoder.use_conv_masks:
        print("this model has no conv masks: padding counts as data, so a result depends on the rest of the batch")
