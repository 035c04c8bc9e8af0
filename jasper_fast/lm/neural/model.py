"""Transformer-XL (Dai et al., 2019) in pre-norm form: relative positions, and a memory of earlier segments.

N rows, L tokens of a segment, M remembered tokens, K = M + L, H heads, D width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jasper_fast.lm.neural.config import LMConfig

BOUNDARY, UNKNOWN = 0, 1  # ids of the token at both ends of each line, and of the unknown word


class Memory(NamedTuple):
    """What the model remembers of earlier tokens.

    hidden (layers, N, M, D): the inputs of each layer. lines (N, M): the line number of each token, or -1 where there
    is no token yet.
    """

    hidden: Tensor
    lines: Tensor


def shifted(x: Tensor) -> Tensor:
    """Turns scores by distance into scores by key; both tensors are (N, H, L, K).

    ``x[..., i, c]`` is the score of query i for the key K - 1 - c positions before it. The position of query i is
    K - L + i. Results for keys after the query are meaningless.
    """
    n, h, length, keys = x.shape
    return F.pad(x, (1, 0)).view(n, h, keys + 1, length)[:, :, 1:].reshape(n, h, length, keys)


class RelativeAttention(nn.Module):
    """Computes ``softmax(((q + u) k^T + (q + w) r^T) / sqrt(D / H)) v``; r is the projected sinusoid of each
    distance, and u and w are learned biases."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.position = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.content_bias = nn.Parameter(torch.zeros(heads, 1, width // heads))
        self.position_bias = nn.Parameter(torch.zeros(heads, 1, width // heads))

    def forward(self, x: Tensor, keys: Tensor, distances: Tensor, visible: Tensor) -> Tensor:
        """Attends from x (N, L, D) to keys (N, K, D), which are the memory and x.

        distances (K, D): sinusoids of K - 1 down to 0; visible (N, 1, L, K): which keys each query sees. Returns (N, L,
        D).
        """
        q, r = self._split(self.query(x)), self._split(self.position(distances)[None])
        k, v = map(self._split, self.key_value(keys).chunk(2, -1))
        bias = shifted((q + self.position_bias) @ r.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        bias = bias.masked_fill(~visible, -math.inf)
        z = F.scaled_dot_product_attention(
            q + self.content_bias, k, v, attn_mask=bias.to(k.dtype), dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(z.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Layer(nn.Module):
    """An attention part and a feed-forward part, each added to its input."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.attention_norm, self.inner_norm = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = RelativeAttention(config.width, config.heads, config.dropout)
        self.inner = nn.Sequential(
            nn.Linear(config.width, config.inner),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.inner, config.width),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, remembered: Tensor, distances: Tensor, visible: Tensor) -> Tensor:
        keys = self.attention_norm(torch.cat((remembered, x), 1))
        x = x + self.dropout(self.attention(keys[:, remembered.shape[1] :], keys, distances, visible))
        return x + self.dropout(self.inner(self.inner_norm(x)))


class TransformerXL(nn.Module):
    """A causal language model: ``hidden, memory = model(tokens, memory)`` and ``model.log_probs(hidden, targets)``."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)
        if config.cutoffs:
            self.softmax = nn.AdaptiveLogSoftmaxWithLoss(config.width, config.vocabulary, list(config.cutoffs))
        else:  # the softmax shares the weight of the embedding
            self.bias = nn.Parameter(torch.zeros(config.vocabulary))
        self.apply(_init)

    def forward(self, tokens: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Returns hidden states (N, L, D) of tokens (N, L) int64, and the memory for the next segment.

        Each row continues from ``memory``. The new memory has at most ``config.memory`` tokens and no gradient.
        """
        lines = (tokens == BOUNDARY).cumsum(1) * (not self.config.joined)
        if memory is None:
            nothing = self.embedding.weight.new_zeros(len(self.layers), len(tokens), 0, self.config.width)
            memory = Memory(nothing, lines[:, :0])
        elif memory.lines.shape[1]:
            lines = lines + memory.lines[:, -1:].clamp_min(0)
        all_lines = torch.cat((memory.lines, lines), 1)
        length, count = tokens.shape[1], all_lines.shape[1]
        causal = torch.ones(length, count, dtype=torch.bool, device=tokens.device).tril(count - length)
        visible = (causal & (lines[:, :, None] == all_lines[:, None]))[:, None]
        distances = self.dropout(_sinusoids(count, self.config.width, self.embedding.weight))
        x = self.dropout(self.embedding(tokens) * math.sqrt(self.config.width))
        kept = []
        for layer, remembered in zip(self.layers, memory.hidden, strict=True):
            kept.append(torch.cat((remembered, x.detach()), 1)[:, max(0, count - self.config.memory) :])
            x = layer(x, remembered, distances, visible)
        return self.dropout(self.norm(x)), Memory(torch.stack(kept), all_lines[:, max(0, count - self.config.memory) :])

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Returns log p (natural) of each target, (N, L) fp32 or fp64, for hidden (N, L, D) and targets (N, L)."""
        if not self.config.cutoffs:
            logits = F.linear(hidden, self.embedding.weight, self.bias)
            return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        with torch.autocast(hidden.device.type, enabled=False):
            rows = hidden.flatten(0, 1).to(self.embedding.weight.dtype)
            return self.softmax(rows, targets.flatten()).output.view_as(targets)


def _sinusoids(count: int, width: int, like: Tensor) -> Tensor:
    """Returns the sinusoids of the distances count - 1 down to 0, (count, width)."""
    place = torch.arange(count - 1, -1, -1, device=like.device, dtype=torch.float32)
    rate = torch.exp(torch.arange(0, width, 2, device=like.device) * (-math.log(10000.0) / width))
    angles = place[:, None] * rate
    return torch.cat((angles.sin(), angles.cos()), 1).to(like.dtype)


def _init(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
