"""The two-layer memory that the deep ops share: M(x) = x + LN(gelu(x W2) W1), or without LN.

Maps are stored as `[d_in, d_out]`, W2 `[d, h]` first and W1 `[h, d]` second. LN has an epsilon of EPS, and scale and
shift `[H, d]` per head; without them the head is the plain sum.
"""

import torch


EPS = 1e-6
ANSWER, NOTHING = -1, -2  # `read` of a write: the memory's whole answer, none at all, else the number of one map


def gelu_backward(grad: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """`grad * gelu'(z)`, exact form."""
    return torch.ops.aten.gelu_backward(grad, z)


def gelu_second(z: torch.Tensor) -> torch.Tensor:
    """`gelu''(z) = (2 - z^2) phi(z)`."""
    square = z * z
    return (2 - square) * torch.exp(-0.5 * square) * 0.3989422804014327


class Norm:
    """n = (r - mean) / sqrt(var + EPS) over the last dimension, or the identity with `active=False`."""

    def __init__(self, r: torch.Tensor, active: bool) -> None:
        self.r, self.active = r, active
        if active:
            self.n, self.mean, self.rstd = torch.native_layer_norm(r, r.shape[-1:], None, None, EPS)
        else:
            self.n = r

    def backward(self, grad: torch.Tensor) -> torch.Tensor:
        """Pull-back of n at r; as a matrix it is symmetric."""
        if not self.active:
            return grad
        mask = [True, False, False]
        args = (self.r, self.r.shape[-1:], self.mean, self.rstd, None, None, mask)
        return torch.ops.aten.native_layer_norm_backward(grad.contiguous(), *args)[0]

    def backward_of_backward(self, grad: torch.Tensor, weighted: torch.Tensor) -> torch.Tensor:
        """Gradient of r from the gradient `grad` of `d = backward(weighted)`, where d depends on r through n and s."""
        inner = (grad * self.n).mean(-1, keepdim=True), (weighted * self.n).mean(-1, keepdim=True)
        grad_n = -(grad * inner[1] + weighted * inner[0]) * self.rstd
        spread = (weighted - weighted.mean(-1, keepdim=True) - self.n * inner[1]) * self.rstd  # d itself
        grad_s = -(grad * spread).sum(-1, keepdim=True) * self.rstd
        return self.backward(grad_n) + grad_s * self.n / self.r.shape[-1]


def per_head(x: torch.Tensor | None, rows: int, dtype: torch.dtype) -> torch.Tensor | None:
    """`[H, d]` to `[rows * H, 1, d]`."""
    return None if x is None else x.to(dtype).expand(rows, *x.shape).reshape(-1, 1, x.shape[-1])
