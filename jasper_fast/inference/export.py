"""Exports a model as a plain graph of convolutions for other runtimes. The results of an ONNX file are compared with
the engine's."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jasper_fast.extras import need
from jasper_fast.inference.engine import InferenceEngine
from jasper_fast.kernels.layout import padding
from jasper_fast.nn.architecture import out_lengths
from jasper_fast.nn.block import JasperBlock, fold
from jasper_fast.nn.config import BlockConfig
from jasper_fast.nn.model import Jasper
from jasper_fast.nn.recognise import parts

INPUTS, OUTPUTS = ("audio_signal", "length"), ("logprobs", "encoded_lengths")
TOLERANCE = 1e-3  # largest allowed difference between log-probabilities of the graph and of the engine, both in fp32
Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ExportError(ValueError):
    """A graph cannot be written, or its results differ from those of the engine."""


class _Conv(nn.Module):
    """A convolution of (N, C, 1, T). It is 2D because runtimes have better kernels for 2D than for 1D."""

    def __init__(self, weight: Tensor, bias: Tensor | None, b: BlockConfig | None = None, groups: int = 1):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight[:, :, None]), None if bias is None else nn.Parameter(bias)
        self.b, self.how = b, {"stride": (1, b.s), "padding": (0, b.padding), "dilation": (1, b.d)} if b else {}
        self.how["groups"] = groups

    @classmethod
    def folded(cls, conv: nn.Conv1d, bn: nn.BatchNorm1d, b: BlockConfig | None = None) -> _Conv:
        scale, shift = fold(bn, torch.float64)
        dtype = conv.weight.dtype
        return cls((conv.weight.double() * scale[:, None, None]).to(dtype), shift.to(dtype), b)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, **self.how)


class PlainJasper(nn.Module):
    """Jasper for evaluation with only convolutions, sums, ReLU, masks and log-softmax, for export to other runtimes.

    `forward(features (N, C, T), lengths (N,)) -> (log_probs (N, T', V) fp32, lengths (N,))` equals that of
    `model.eval()` on rows t < length. `model` is a Jasper or an EagerJasper; batch norm is folded into copies of the
    model's weights. With conv masks, results depend neither on the length of the padding nor on its content.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module):
        super().__init__()
        self.config = model.config
        self.blocks, self.panes = nn.ModuleList(), nn.ModuleList()
        for layer, b in zip(model.encoder.layers, self.config.encoder.blocks, strict=True):
            convs = nn.ModuleList()
            for sub in layer.sub_blocks if isinstance(layer, JasperBlock) else parts(layer).sub_blocks:
                if sub.taps is not None:
                    convs.append(_Conv(sub.taps.weight.detach().clone(), None, b, sub.taps.groups))
                convs.append(_Conv.folded(sub.conv, sub.bn, None if sub.taps is not None else b))
            self.blocks.append(convs)
            self.panes.append(nn.ModuleList(_Conv.folded(*pane) for pane in getattr(layer, "res", ())))
        head = model.decoder.layers[0]
        self.head = _Conv(head.weight.detach().clone(), head.bias.detach().clone())

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        xs = [self._masked(features.unsqueeze(2), lengths)]
        for convs, panes, b in zip(self.blocks, self.panes, self.config.encoder.blocks, strict=True):
            x = xs[-1]
            for i, conv in enumerate(convs):
                x, lengths = conv(x), conv.b.out_length(lengths) if conv.b else lengths
                if i == len(convs) - 1:
                    for pane, source in zip(panes, xs if b.residual_dense else xs[-1:], strict=False):
                        x = x + pane(source)
                x = self._masked(x if conv.bias is None else x.relu(), lengths)
            xs = [*xs, x] if b.dense else [x]
        return self.head(xs[-1]).squeeze(2).transpose(1, 2).float().log_softmax(dim=2), lengths

    def _masked(self, x: Tensor, lengths: Tensor) -> Tensor:
        if not self.config.encoder.use_conv_masks:
            return x
        return x.masked_fill(padding(lengths, x.shape[3])[:, None], 0)


def example(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Returns features and lengths for tracing. N and T are neither 1 nor round numbers, because a tracer might take
    those for constants."""
    weight = model.head.weight
    features = torch.zeros(3, model.config.encoder.in_feats, 187, device=weight.device, dtype=weight.dtype)
    return features, torch.tensor([187, 101, 53], device=weight.device)


def program(model: nn.Module) -> torch.export.ExportedProgram:
    """Returns the plain graph of `model` from `torch.export`: only ATen's operations, for any N, and for any T of which
    the model makes at least two frames. (The tracer takes a single frame for a constant.)

    Save it with `torch.export.save`. It can be loaded without this package.
    """
    plain = PlainJasper(model).eval()
    n, t = torch.export.Dim("N", min=1), torch.export.Dim.DYNAMIC
    with torch.no_grad():
        return torch.export.export(plain, example(plain), dynamic_shapes=({0: n, 2: t}, {0: n}))


def write_onnx(
    model: nn.Module, path: str | Path, inputs: Sequence[str] = INPUTS, outputs: Sequence[str] = OUTPUTS
) -> None:
    """Writes the plain graph of `model` as an ONNX file. Large weights are written beside it, to `path`.data.

    Raises MissingExtra if onnx or onnxscript is not installed.
    """
    need("onnx", "export"), need("onnxscript", "export")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # otherwise it reports that torchvision is absent
    plain = program(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of PyTorch's exporter about its own code
        torch.onnx.export(
            plain, (), str(path), input_names=list(inputs), output_names=list(outputs), dynamo=True, verbose=False
        )


def differs(run: Run, engine: Run, model: nn.Module, seed: int = 0) -> float:
    """Returns the largest difference between the log-probabilities of `run` and `engine` in valid frames, for random
    features.

    `run` gets three utterances in one batch, with NaN in the padding if there are conv masks, and then each utterance
    by itself at its own length. The lengths are not those with which the export was traced. Raises ExportError if `run`
    returns other lengths than the model.
    """
    masks = model.config.encoder.use_conv_masks
    lengths = torch.tensor([331, 90, 17]) if masks else torch.tensor([331, 331, 331])
    features = torch.randn(3, model.config.encoder.in_feats, 331, generator=torch.Generator().manual_seed(seed))
    if masks:
        features.masked_fill_((torch.arange(331) >= lengths[:, None])[:, None], math.nan)
    batch, found = run(features, lengths)
    expected = out_lengths(model.config, lengths)
    if found.tolist() != expected.tolist():
        raise ExportError(f"the graph returns lengths {found.tolist()}, but the model returns {expected.tolist()}")
    worst = 0.0
    for i, (length, frames) in enumerate(zip(lengths.tolist(), expected.tolist(), strict=True)):
        alone = features[i : i + 1, :, :length].contiguous(), lengths[i : i + 1]
        wanted = engine(*alone)[0][0, :frames]
        for got in (batch[i, :frames], run(*alone)[0][0, :frames]):
            worst = max(worst, (got - wanted).abs().nan_to_num(math.inf).max().item())
    return worst


def in_onnx_runtime(path: str | Path) -> Run:
    """Returns a function that runs the graph of an ONNX file in ONNX Runtime on the CPU. Raises MissingExtra if
    onnxruntime is not installed."""
    session = need("onnxruntime", "export").InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        found = session.run(list(OUTPUTS), dict(zip(INPUTS, (features.numpy(), lengths.numpy()), strict=True)))
        return tuple(map(torch.from_numpy, found))

    return run


def export_onnx(model: Jasper, labels: Sequence[str], folder: str | Path) -> float:
    """Writes `model` as a folder for onnx-asr, if ONNX Runtime's results agree with the engine's. Returns their largest
    difference. `model` itself is moved to the CPU, converted to fp32 and put into evaluation mode.

    `model.onnx` takes `audio_signal` (N, C, T) fp32 and `length` (N,) int64, and returns `logprobs` (N, T', V) and
    `encoded_lengths`. `vocab.txt` and `config.json` are in onnx-asr's format, and `features.json` has the settings of
    the features. Raises ExportError, and writes nothing, if `folder` is a file or is not empty, and if the results
    differ by more than TOLERANCE or have other lengths. Raises MissingExtra if onnx, onnxscript or onnxruntime is not
    installed.
    """
    need("onnx", "export"), need("onnxscript", "export"), need("onnxruntime", "export")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} exists and is not an empty folder; choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    model = model.float().cpu().eval()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        write_onnx(model, made / "model.onnx")
        difference = differs(in_onnx_runtime(made / "model.onnx"), InferenceEngine(model), model)
        if difference > TOLERANCE:
            raise ExportError(
                f"ONNX Runtime's log-probabilities differ by {difference:.2g} from the engine's, which is more than "
                f"rounding ({TOLERANCE}); nothing was written"
            )
        for name, text in _beside(model, labels).items():
            (made / name).write_text(text, encoding="utf-8")
        os.replace(made, folder)  # also if `folder` is an empty folder
    return difference


def _beside(model: Jasper, labels: Sequence[str]) -> dict[str, str]:
    """Returns the texts of vocab.txt, config.json and features.json, by file name."""
    encoder = model.config.encoder
    symbols = ["▁" if label == " " else label for label in labels] + ["<blk>"]
    return {
        "vocab.txt": "".join(f"{symbol} {i}\n" for i, symbol in enumerate(symbols)),
        "config.json": json.dumps(
            {
                "model_type": "nemo-conformer-ctc",
                "features_size": encoder.in_feats,
                "subsampling_factor": encoder.stride,
            },
            indent=1,
        ),
        "features.json": json.dumps(model.config.filterbank, indent=1),
    }
