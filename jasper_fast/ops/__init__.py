"""The public ops, one function each. An op is registered with torch.library, and its faces share one autograd formula.

Most functions ask dispatch.choose for the name of a face, and pass that name to their op, which calls the function of
that face's module. `gram`, `pane_stats` and `panes` have only one implementation.

N batch, C channels, T frames, K taps, M = N*T rows. Activations have the logical shape (N, C, T), in NTC memory.
"""

from jasper_fast.ops.bn_relu_dropout_op import bn_relu_dropout, bn_stats, draw_seeds
from jasper_fast.ops.conv1d_op import conv1d
from jasper_fast.ops.ctc_op import ctc_loss
from jasper_fast.ops.depthwise_op import depthwise
from jasper_fast.ops.panes_op import Gram, gram, pane_stats, panes
from jasper_fast.ops.panes_plain_op import panes_plain
from jasper_fast.ops.separable_op import separable_conv, separable_sub_block
from jasper_fast.ops.sub_block_op import sub_block

__all__ = [
    "Gram",
    "bn_relu_dropout",
    "bn_stats",
    "conv1d",
    "ctc_loss",
    "depthwise",
    "draw_seeds",
    "gram",
    "pane_stats",
    "panes",
    "panes_plain",
    "separable_conv",
    "separable_sub_block",
    "sub_block",
]
