"""What the kernels of deep memories share: gelu, the layer norm, one memory's inner answers, the rows of inner chunks.

A memory is W2 `[D, H]` and W1 `[H, D]`, see `deep_common`. Rows are padded to BD columns, which stay zero.
"""

import torch
import triton
import triton.language as tl

from .deep import ANSWER, EPS
from .triton import chip, dot, narrow, power_of_two


WHOLE = tl.constexpr(ANSWER)
NORM_EPS = tl.constexpr(EPS)


@triton.jit
def gelu(b_z):
    return 0.5 * b_z * (1.0 + tl.math.erf(b_z * 0.7071067811865476))


@triton.jit
def gelu_curvature(b_z):
    return (2.0 - b_z * b_z) * tl.exp(-0.5 * b_z * b_z) * 0.3989422804014327


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
def store_maps(w2, w1, b_w2, b_w1, start, D: tl.constexpr, H: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr):
    """Inverse of `load_maps`."""
    o_d, o_h = tl.arange(0, BD), start + tl.arange(0, BH)
    m_d, m_h = o_d < D, o_h < H
    tl.store(w2 + o_d[:, None] * H + o_h[None, :], b_w2, mask=m_d[:, None] & m_h[None, :])
    tl.store(w1 + o_h[:, None] * D + o_d[None, :], b_w1, mask=m_h[:, None] & m_d[None, :])


@triton.jit
def inner_answers(
    b_x,
    w2,
    w1,
    D: tl.constexpr,
    H: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """r = gelu(x W2) W1 [BT, BD] of one memory."""
    b_r = tl.zeros((BT, BD), tl.float32)
    for start in range(0, H, BH):
        b_w2, b_w1 = load_maps(w2, w1, start, D, H, BD, BH)
        b_a = gelu(dot(b_x, b_w2, None, PRECISION))
        b_r = dot(narrow(b_a, b_x.dtype), b_w1, b_r, PRECISION)
    return b_r


@triton.jit
def inner_backward(
    b_x,
    b_grad_r,
    w2,
    w1,
    b_grad_x,
    D: tl.constexpr,
    H: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    PRECISION: tl.constexpr,
):
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


# -------------------------------------------------------------------------------------------------- inner chunks
@triton.jit
def load_tokens(x, first, heads, m_c, D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr):
    """One chunk's rows [BC, BD] of x `[B, W, H, D]` in fp32; first: number of its first row."""
    o_c, o_d = tl.arange(0, BC), tl.arange(0, BD)
    o_cd = (o_c * heads * D)[:, None] + o_d[None, :]
    return tl.load(x + first * D + o_cd, mask=m_c[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tokens(x, b_x, first, heads, m_c, D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr):
    o_c, o_d = tl.arange(0, BC), tl.arange(0, BD)
    o_cd = (o_c * heads * D)[:, None] + o_d[None, :]
    tl.store(x + first * D + o_cd, narrow(b_x, x.dtype.element_ty), mask=m_c[:, None] & (o_d < D)[None, :])


@triton.jit
def hidden_tokens(x, first, heads, start, m_c, H: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr):
    """Pointers and mask of one block of hidden units of `[B, W, H, hidden]`."""
    o_c, o_h = tl.arange(0, BC), start + tl.arange(0, BH)
    return x + first * H + (o_c * heads * H)[:, None] + o_h[None, :], m_c[:, None] & (o_h < H)[None, :]


@triton.jit
def load_part(coefficients, cell, part, m_c, J: tl.constexpr, C: tl.constexpr, BC: tl.constexpr):
    """One column [BC] of `enter` or `leave`."""
    return tl.load(coefficients + cell * C * J + tl.arange(0, BC) * J + part, mask=m_c, other=0.0)


@triton.jit
def load_mix(mix, cell, m_c, C: tl.constexpr, BC: tl.constexpr):
    o_c = tl.arange(0, BC)
    return tl.load(mix + cell * C * C + o_c[:, None] * C + o_c[None, :], mask=m_c[:, None] & m_c[None, :], other=0.0)


@triton.jit
def load_vector(x, head, D: tl.constexpr, BD: tl.constexpr):
    o_d = tl.arange(0, BD)
    return tl.load(x + head * D + o_d, mask=o_d < D, other=0.0)


@triton.jit
def keys_of(
    b_k,
    b_v,
    c2,
    c1,
    b_scale,
    b_shift,
    D: tl.constexpr,
    H: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BC: tl.constexpr,
    NORM: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """n and 1 / s, the gradient e of the answers, and d1, that of r, of the chunk's keys at the maps C. Without NORM
    scale is 1 and shift 0."""
    b_r = inner_answers(b_k, c2, c1, D, H, BD, BH, BC, PRECISION)
    b_n, b_rstd = normalize(b_r, D, BD, NORM)
    if DOT:
        b_e = -b_v
    else:
        b_e = 2.0 * (b_k + b_n * b_scale[None, :] + b_shift[None, :] - b_v)
    b_d1 = normalize_backward(b_e * b_scale[None, :], b_n, b_rstd, D, BD, NORM)
    return b_n, b_rstd, b_e, b_d1


@triton.jit
def norm_parameters(scale, shift, head, D: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr):
    if NORM:
        return load_vector(scale, head, D, BD), load_vector(shift, head, D, BD)
    else:
        return tl.zeros((BD,), tl.float32) + 1.0, tl.zeros((BD,), tl.float32)


def sizes_of(w2: torch.Tensor) -> dict[str, int]:
    """The compile-time sizes of memories with maps like w2 `[..., D, H]` of the operand dtype."""
    width, hidden = w2.shape[-2:]
    block = min(power_of_two(hidden), 32 if _small(w2) else 64)
    return {"D": width, "H": hidden, "BD": power_of_two(width), "BH": block}


def backward_sizes(w2: torch.Tensor) -> dict[str, int]:
    """What a backward has other than `sizes_of`: two maps' gradients, or both passes over a memory, on one chip."""
    return {"BH": min(power_of_two(w2.shape[-1]), 32 if _small(w2) or w2.shape[-2] > 64 else 64)}


def tile_of(w2: torch.Tensor) -> int:
    """Tokens per program."""
    return 32 if _small(w2) else 64


def warps_of(w2: torch.Tensor) -> int:
    return 8 if w2.shape[-2] > 64 else 4


def _small(w2: torch.Tensor) -> bool:
    return w2.dtype == torch.float32 or chip(w2) == "amd"
