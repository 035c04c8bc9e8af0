"""A look-alike of NVIDIA's Jasper for PyTorch, for tests, with its class names, attributes, signatures and keys.

It is written from a description, not from NVIDIA's source. A test compares it with golden results of NVIDIA's code.
"""

import torch
from torch import nn

from . import frames, with_panes


class MaskedConv1d(nn.Conv1d):
    def __init__(self, *args, masked=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.masked = masked

    def forward(self, x, x_lens=None):
        if not self.masked:
            return super().forward(x), x_lens
        padding = torch.arange(x.shape[2], device=x.device) >= x_lens[:, None]
        return super().forward(x.masked_fill(padding[:, None], 0)), frames(self, x_lens)


class JasperBlock(nn.Module):
    def __init__(self, c_in, b, panes, masks, activation):
        super().__init__()
        self.dense_residual, self.use_conv_masks = b["residual"] and b["residual_dense"], masks
        (k,), (s,), (d,), c, act = b["kernel_size"], b["stride"], b["dilation"], b["filters"], activation()
        self.conv = nn.ModuleList()
        for i in range(b["repeat"]):
            conv = MaskedConv1d(c if i else c_in, c, k, s, (k // 2) * d, d, bias=False, masked=masks)
            self.conv += [conv, nn.BatchNorm1d(c, 1e-3, 0.1)]
            if i < b["repeat"] - 1:
                self.conv += [act, nn.Dropout(b["dropout"])]
        convs = [MaskedConv1d(pane, c, 1, bias=False, masked=masks) for pane in panes]
        self.res = nn.ModuleList(nn.ModuleList([conv, nn.BatchNorm1d(c, 1e-3, 0.1)]) for conv in convs) or None
        self.out = nn.Sequential(act, nn.Dropout(b["dropout"]))

    def forward(self, xs, xs_lens=None):
        x, lens = xs[-1], xs_lens
        for layer in self.conv:
            if isinstance(layer, MaskedConv1d):
                x, lens = layer(x, lens)
            else:
                x = layer(x)
        for i, pane in enumerate(self.res or ()):
            y, _ = pane[0](xs[i] if self.dense_residual else xs[-1], xs_lens)
            x = x + pane[1](y)
        x = self.out(x)
        return ([*xs, x] if self.dense_residual else [x]), lens if self.use_conv_masks else None


class JasperEncoder(nn.Module):
    def __init__(self, in_feats, blocks, use_conv_masks=True, activation=nn.ReLU):
        super().__init__()
        self.use_conv_masks = use_conv_masks
        self.layers = nn.ModuleList(
            JasperBlock(*shape, use_conv_masks, activation) for shape in with_panes(blocks, in_feats)
        )

    def forward(self, x, x_lens=None):
        xs, lens = [x], x_lens
        for layer in self.layers:
            xs, lens = layer(xs, lens)
        return xs, lens


class JasperDecoderForCTC(nn.Module):
    def __init__(self, in_feats, n_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(in_feats, n_classes, 1, bias=True))

    def forward(self, enc_out):
        return self.layers(enc_out[-1]).transpose(1, 2).log_softmax(dim=2)


class Jasper(nn.Module):
    def __init__(self, encoder_kw, decoder_kw, transpose_in=False):
        super().__init__()
        self.transpose_in = transpose_in
        self.encoder, self.decoder = JasperEncoder(**encoder_kw), JasperDecoderForCTC(**decoder_kw)

    def forward(self, x, x_lens=None):
        if self.encoder.use_conv_masks:
            enc, lens = self.encoder(x, x_lens)
            return self.decoder(enc), lens
        enc, _ = self.encoder(x.transpose(1, 2) if self.transpose_in else x)
        return self.decoder(enc)
