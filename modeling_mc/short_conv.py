# Copyright 2026 the mc-transformers authors.
"""The short convolution behind a projection, and its SiLU."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels.shared.recompute import recomputed
from .tensor_parallel import HeadShare


class ShortConv(nn.Conv1d):
    """Causal depthwise convolution over time, and SiLU; channels belong to heads.

    Args:
        channels: C. size: K, taps. bias: whether there is one.
    """

    share: HeadShare | None = None

    def __init__(self, channels: int, size: int, bias: bool) -> None:
        super().__init__(channels, channels, size, groups=channels, bias=bias)

    def forward(self, x: torch.Tensor, then: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """`[R, T, C]` of tokens `[R, K - 1 + T, C]`, the first K - 1 of which came before. Of all of it only x is kept
        for the backward, with `then`, a function of one token's channels that comes last."""
        weight, bias = self.weight, self.bias
        if self.share is not None:
            weight, bias = self.share.part(weight), None if bias is None else self.share.part(bias)

        def convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            y = F.silu(_convolved(x, weight, bias))
            return y if then is None else then(y)

        return recomputed(convolved, x, weight, bias)


def _convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`[R, T, C]` of `[R, K - 1 + T, C]`, with weights `[C, 1, K]`."""
    if x.shape[1] == weight.shape[-1]:  # one token: a product, which costs less than a convolution's set-up
        y = (x * weight[:, 0].t()).sum(1, keepdim=True)
        return y if bias is None else y + bias
    if x.device.type != "cpu":
        return F.conv1d(x.transpose(1, 2), weight, bias, groups=len(weight)).transpose(1, 2).contiguous()
    # an image one pixel high whose channels lie side by side in memory: 6 to 40 times as fast as `conv1d`
    image = x[:, None].permute(0, 3, 1, 2)
    return F.conv2d(image, weight[:, :, None], bias, groups=len(weight)).permute(0, 2, 3, 1)[:, 0]
