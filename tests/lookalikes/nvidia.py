"""The classes of NVIDIA's Jasper for PyTorch."""

from __future__ import annotations

from torch import nn

from lookalikes.shared import EPS, beyond, frames, plan


class MaskedConv1d(nn.Conv1d):
    def __init__(self, *args, masked=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.masked = masked

    def forward(self, x, x_lens=None):
        if self.masked:
            x = x.masked_fill(beyond(x, x_lens)[:, None], 0)
            x_lens = frames(x_lens, self)
        return super().forward(x), x_lens


class JasperBlock(nn.Module):
    def __init__(self, c_in, b, panes, use_conv_masks):
        super().__init__()
        k, s, d = b["kernel_size"][0], b["stride"][0], b["dilation"][0]
        self.dense_residual, self.use_conv_masks = b["residual_dense"], use_conv_masks
        self.conv = nn.ModuleList()
        for i in range(b["repeat"]):
            channels = b["filters"] if i else c_in
            how = {"stride": s, "dilation": d, "padding": k // 2 * d, "bias": False, "masked": use_conv_masks}
            self.conv.append(MaskedConv1d(channels, b["filters"], k, **how))
            self.conv.append(nn.BatchNorm1d(b["filters"], eps=EPS, momentum=0.1))
            if i < b["repeat"] - 1:
                self.conv.extend([nn.ReLU(inplace=True), nn.Dropout(b["dropout"])])
        self.res = None
        if panes:
            self.res = nn.ModuleList()
            for channels in panes:
                conv = MaskedConv1d(channels, b["filters"], 1, bias=False, masked=use_conv_masks)
                self.res.append(nn.ModuleList([conv, nn.BatchNorm1d(b["filters"], eps=EPS, momentum=0.1)]))
        self.out = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(b["dropout"]))

    def forward(self, xs, xs_lens=None):
        x, lens = xs[-1], xs_lens
        for layer in self.conv:
            if isinstance(layer, MaskedConv1d):
                x, lens = layer(x, lens)
            else:
                x = layer(x)
        if self.res is not None:
            for source, (conv, bn) in zip(xs, self.res, strict=True):
                x = x + bn(conv(source, xs_lens)[0])
        x = self.out(x)
        xs = [*xs, x] if self.res is not None and self.dense_residual else [x]
        return xs, lens if self.use_conv_masks else None


class JasperEncoder(nn.Module):
    def __init__(self, in_feats, blocks, use_conv_masks):
        super().__init__()
        self.use_conv_masks, self.layers = use_conv_masks, nn.ModuleList()
        for c_in, b, panes in plan(in_feats, blocks):
            self.layers.append(JasperBlock(c_in, b, panes, use_conv_masks))

    def forward(self, x, x_lens=None):
        xs, lens = [x], x_lens
        for layer in self.layers:
            xs, lens = layer(xs, lens)
        return xs, lens


class JasperDecoderForCTC(nn.Module):
    def __init__(self, in_feats, n_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(in_feats, n_classes, 1))

    def forward(self, xs):
        return self.layers(xs[-1]).transpose(1, 2).log_softmax(dim=2)


class Jasper(nn.Module):
    def __init__(self, encoder_kw, decoder_kw, transpose_in=False):
        super().__init__()
        self.transpose_in = transpose_in
        self.encoder, self.decoder = JasperEncoder(**encoder_kw), JasperDecoderForCTC(**decoder_kw)

    def forward(self, x, x_lens=None):
        if self.encoder.use_conv_masks:
            xs, lens = self.encoder(x, x_lens)
            return self.decoder(xs), lens
        return self.decoder(self.encoder(x.transpose(1, 2) if self.transpose_in else x)[0])
