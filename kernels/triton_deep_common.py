"""What the kernels of deep memories share: gelu, the layer norm of a read, and one memory's inner answers.

A memory is W2 `[D, H]` and W1 `[H, D]`, see `deep_common`. Rows are padded to BD columns, which stay zero.
"""

import torch
import triton
import triton.language as tl

from .deep_common import EPS
from .triton_common import chip, dot, narrow, power_of_two


NORM_EPS = tl.constexpr(EPS)


@triton.jit
def gelu(b_z):
    return 0.5 * b_z * (1.0 + tl.math.erf(b_z * 0.7071067811865476))


@triton.jit
def gelu_slope(b_z):
    b_density = tl.exp(-0.5 * b_z * b_z) * 0.3989422804014327
    return 0.5 * (1.0 + tl.math.erf(b_z * 0.7071067811865476)) + b_z * b_density


@triton.jit
def normalize(b_r, D: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr):
    """n = (r - mean) / s and 1 / s of rows [BT, BD], or r and 1 without NORM."""
    if NORM:
        b_mean = tl.sum(b_r, 1) / D
        b_centred = tl.where((tl.arange(0, BD) < D)[None, :], b_r - b_mean[:, None], 0.0)
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_centred * b_centred, 1) / D + NORM_EPS)
        return b_centred * b_rstd[:, None], b_rstd
    else:
        return b_r, tl.sum(tl.zeros_like(b_r), 1) + 1.0


@triton.jit
def normalize_backward(b_grad, b_n, b_rstd, D: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr):
    """Gradient of r from that of n."""
    if NORM:
        b_mean, b_along = tl.sum(b_grad, 1) / D, tl.sum(b_grad * b_n, 1) / D
        b_back = (b_grad - b_mean[:, None] - b_n * b_along[:, None]) * b_rstd[:, None]
        return tl.where((tl.arange(0, BD) < D)[None, :], b_back, 0.0)
    else:
        return b_grad


@triton.jit
def load_maps(w2, w1, start, D: tl.constexpr, H: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr):
    """Blocks [BD, BH] of W2 and [BH, BD] of W1: the hidden units from `start` on."""
    o_d, o_h = tl.arange(0, BD), start + tl.arange(0, BH)
    m_d, m_h = o_d < D, o_h < H
    b_w2 = tl.load(w2 + o_d[:, None] * H + o_h[None, :], mask=m_d[:, None] & m_h[None, :], other=0.0)
    b_w1 = tl.load(w1 + o_h[:, None] * D + o_d[None, :], mask=m_h[:, None] & m_d[None, :], other=0.0)
    return b_w2, b_w1


@triton.jit
def inner_answers(
    b_x, w2, w1, D: tl.constexpr, H: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """r = gelu(x W2) W1 [BT, BD] of one memory."""
    b_r = tl.zeros((BT, BD), tl.float32)
    for start in range(0, H, BH):
        b_w2, b_w1 = load_maps(w2, w1, start, D, H, BD, BH)
        b_a = gelu(dot(b_x, b_w2, None, PRECISION))
        b_r = dot(narrow(b_a, b_x.dtype), b_w1, b_r, PRECISION)
    return b_r


@triton.jit
def inner_backward(
    b_x, b_grad_r, w2, w1, b_grad_x, D: tl.constexpr, H: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of x to b_grad_x, from that of r (of the operand dtype)."""
    for start in range(0, H, BH):
        b_w2, b_w1 = load_maps(w2, w1, start, D, H, BD, BH)
        b_slope = gelu_slope(dot(b_x, b_w2, None, PRECISION))
        b_grad_z = b_slope * dot(b_grad_r, tl.trans(b_w1), None, PRECISION)
        b_grad_x = dot(narrow(b_grad_z, b_x.dtype), tl.trans(b_w2), b_grad_x, PRECISION)
    return b_grad_x


@triton.jit
def maps_backward(b_x, b_grad_r, b_w2, b_w1, b_grad_w2, b_grad_w1, PRECISION: tl.constexpr):
    """Adds what rows x and the gradient of their r (of the operand dtype) give to a block of both maps' gradients."""
    b_z = dot(b_x, b_w2, None, PRECISION)
    b_grad_z = gelu_slope(b_z) * dot(b_grad_r, tl.trans(b_w1), None, PRECISION)
    b_grad_w2 = dot(tl.trans(b_x), narrow(b_grad_z, b_x.dtype), b_grad_w2, PRECISION)
    b_grad_w1 = dot(tl.trans(narrow(gelu(b_z), b_x.dtype)), b_grad_r, b_grad_w1, PRECISION)
    return b_grad_w2, b_grad_w1


def sizes_of(w2: torch.Tensor) -> dict[str, int]:
    """The compile-time sizes of memories with maps like w2 `[..., D, H]` of the operand dtype."""
    width, hidden = w2.shape[-2:]
    block = min(power_of_two(hidden), 32 if _small(w2) else 64)
    return {"D": width, "H": hidden, "BD": power_of_two(width), "BH": block}


def backward_sizes(w2: torch.Tensor) -> dict[str, int]:
    """What a backward has other than `sizes_of`: two maps' gradients, or both passes over a memory, on one chip."""
    return {"BH": min(power_of_two(w2.shape[-1]), 32 if _small(w2) or w2.shape[-2] > 64 else 64)}


def tile_of(w2: torch.Tensor, rows: int) -> int:
    """Tokens per program."""
    return min(power_of_two(rows), 32 if _small(w2) else 64)


def warps_of(w2: torch.Tensor) -> int:
    return 8 if w2.shape[-2] > 64 else 4


def _small(w2: torch.Tensor) -> bool:
    return w2.dtype == torch.float32 or chip(w2) == "amd"
