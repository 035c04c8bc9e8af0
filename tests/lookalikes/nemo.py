"""The classes of NeMo's convolutional encoder and CTC model."""

from __future__ import annotations

import torch
from torch import nn

from lookalikes.shared import EPS, beyond, frames, plan


class MaskedConv1d(nn.Module):
    def __init__(self, *args, use_mask=True, heads=-1, **kwargs):
        super().__init__()
        self.conv, self.use_mask, self.heads, self.pad_layer = nn.Conv1d(*args, **kwargs), use_mask, heads, None

    def forward(self, x, lens):
        if self.use_mask:
            x = x * ~beyond(x, lens)[:, None]
            lens = frames(lens, self.conv)
        return self.conv(x), lens


class JasperBlock(nn.Module):
    def __init__(self, c_in, b, panes, conv_mask, activation, residual_mode="add", layer_idx=0):
        super().__init__()
        self.conv_mask, self.residual_mode, self.layer_idx = conv_mask, residual_mode, layer_idx
        self.separable, self.se, self.dense_residual = False, False, b["residual_dense"]
        k, s, d = b["kernel_size"][0], b["stride"][0], b["dilation"][0]
        kind = MaskedConv1d if conv_mask else nn.Conv1d
        self.mconv = nn.ModuleList()
        for i in range(b["repeat"]):
            channels = b["filters"] if i else c_in
            how = {"stride": s, "dilation": d, "padding": d * (k - 1) // 2, "bias": False}
            self.mconv.append(kind(channels, b["filters"], k, **how))
            self.mconv.append(nn.BatchNorm1d(b["filters"], eps=EPS, momentum=0.1))
            if i < b["repeat"] - 1:
                self.mconv.extend([activation, nn.Dropout(b["dropout"])])
        self.res = None
        if panes:
            self.res = nn.ModuleList()
            for channels in panes:
                bn = nn.BatchNorm1d(b["filters"], eps=EPS, momentum=0.1)
                self.res.append(nn.ModuleList([kind(channels, b["filters"], 1, bias=False), bn]))
        self.mout = nn.Sequential(activation, nn.Dropout(b["dropout"]))

    def forward(self, input_):
        xs, lens_in = input_ if len(input_) == 2 else (input_[0], None)
        x, lens = xs[-1], lens_in
        for layer in self.mconv:
            if isinstance(layer, MaskedConv1d):
                x, lens = layer(x, lens)
            else:
                x = layer(x)
        if self.res is not None:
            for source, (conv, bn) in zip(xs, self.res, strict=True):
                y = bn(conv(source, lens_in)[0] if isinstance(conv, MaskedConv1d) else conv(source))
                x = torch.max(x, y) if self.residual_mode == "max" else x + y
        x = self.mout(x)
        return ([*xs, x] if self.res is not None and self.dense_residual else [x]), lens


class ConvASREncoder(nn.Module):
    def __init__(self, feat_in, jasper, conv_mask=True, residual_mode="add"):
        super().__init__()
        activation = nn.ReLU(inplace=True)  # one for all blocks
        self.encoder = nn.Sequential(
            *(
                JasperBlock(c_in, b, panes, conv_mask, activation, residual_mode, i)
                for i, (c_in, b, panes) in enumerate(plan(feat_in, jasper))
            )
        )

    def forward(self, audio_signal, length):
        xs, length = self.encoder(([audio_signal], length))
        return xs[-1], length


class ConvASRDecoder(nn.Module):
    def __init__(self, feat_in, num_classes):
        super().__init__()
        self.decoder_layers = nn.Sequential(nn.Conv1d(feat_in, num_classes, 1))

    def forward(self, encoder_output):
        return self.decoder_layers(encoder_output).transpose(1, 2).log_softmax(dim=-1)


class EncDecCTCModel(nn.Module):
    def __init__(self, encoder_kw, decoder_kw):
        super().__init__()
        self.encoder, self.decoder = ConvASREncoder(**encoder_kw), ConvASRDecoder(**decoder_kw)

    def forward(self, processed_signal, processed_signal_length):
        encoded, lengths = self.encoder(audio_signal=processed_signal, length=processed_signal_length)
        return self.decoder(encoder_output=encoded), lengths
