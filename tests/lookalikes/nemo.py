"""A look-alike of NeMo's Jasper, for tests, with its class names, attributes, signatures and state-dict keys.

It is written from a description, not from NeMo's source.
"""

import torch
from torch import nn

from . import frames, with_panes


class MaskedConv1d(nn.Module):
    def __init__(self, *args, use_mask=True, heads=-1, **kwargs):
        super().__init__()
        self.conv = nn.Conv1d(*args, **kwargs)
        self.use_mask, self.heads, self.pad_layer = use_mask, heads, None

    def forward(self, x, lens):
        if not self.use_mask:
            return self.conv(x), lens
        x = x * (torch.arange(x.shape[2], device=x.device) < lens[:, None])[:, None].to(x.dtype)
        return self.conv(x), frames(self.conv, lens)


class JasperBlock(nn.Module):
    def __init__(self, c_in, b, panes, conv_mask, activation, layer_idx=0):
        super().__init__()
        self.conv_mask, self.layer_idx = conv_mask, layer_idx
        self.separable, self.residual_mode, self.se = b.get("separable", False), "add", False
        self.dense_residual = b["residual"] and b["residual_dense"]
        (k,), (s,), (d,), c = b["kernel_size"], b["stride"], b["dilation"], b["filters"]
        self.mconv = nn.ModuleList()
        for i in range(b["repeat"]):
            width, how = c_in if i == 0 else c, {"stride": s, "padding": d * (k - 1) // 2, "dilation": d}
            if self.separable:
                self.mconv += [self._conv(width, width, k, groups=width, **how), self._conv(width, c, 1)]
            else:
                self.mconv.append(self._conv(width, c, k, **how))
            self.mconv.append(nn.BatchNorm1d(c, 1e-3, 0.1))
            if i < b["repeat"] - 1:
                self.mconv += [activation, nn.Dropout(b["dropout"])]
        pairs = (nn.ModuleList([self._conv(pane, c, 1), nn.BatchNorm1d(c, 1e-3, 0.1)]) for pane in panes)
        self.res = nn.ModuleList(pairs) if panes else None
        self.mout = nn.Sequential(activation, nn.Dropout(b["dropout"]))

    def _conv(self, *args, **kwargs):
        return (MaskedConv1d if self.conv_mask else nn.Conv1d)(*args, bias=False, **kwargs)

    def _run(self, layer, x, lens):
        return layer(x, lens) if isinstance(layer, MaskedConv1d) else (layer(x), lens)

    def forward(self, input_):
        xs, lens_in = input_
        x, lens = xs[-1], lens_in
        for layer in self.mconv:
            x, lens = self._run(layer, x, lens)
        for i, pane in enumerate(self.res or ()):
            y = xs[i] if self.dense_residual else xs[-1]
            for layer in pane:
                y, _ = self._run(layer, y, lens_in)
            x = x + y
        x = self.mout(x)
        return ([*xs, x] if self.res is not None and self.dense_residual else [x]), lens


class ConvASREncoder(nn.Module):
    def __init__(self, feat_in, jasper, conv_mask=True):
        super().__init__()
        activation = nn.ReLU(inplace=True)
        self.encoder = nn.Sequential(
            *(JasperBlock(*shape, conv_mask, activation, i) for i, shape in enumerate(with_panes(jasper, feat_in)))
        )

    def forward(self, audio_signal, length):
        xs, length = self.encoder(([audio_signal], length))
        return xs[-1], length


class ConvASRDecoder(nn.Module):
    def __init__(self, feat_in, num_classes):
        super().__init__()
        self.temperature = 1.0
        self.decoder_layers = nn.Sequential(nn.Conv1d(feat_in, num_classes, 1, bias=True))

    def forward(self, encoder_output):
        return (self.decoder_layers(encoder_output).transpose(1, 2) / self.temperature).log_softmax(dim=-1)


class EncDecCTCModel(nn.Module):
    def __init__(self, feat_in, jasper, num_classes, conv_mask=True):
        super().__init__()
        self.encoder = ConvASREncoder(feat_in, jasper, conv_mask)
        self.decoder = ConvASRDecoder(jasper[-1]["filters"], num_classes)

    def forward(self, processed_signal, processed_signal_length):
        encoded, lens = self.encoder(audio_signal=processed_signal, length=processed_signal_length)
        return self.decoder(encoder_output=encoded), lens
