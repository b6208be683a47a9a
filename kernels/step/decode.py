"""Reading the memory for one token per row, as decoding does: gates, choice and read in one op for matrix memories.

    o = sum_i g_i S_i^T q + g_on S^T q ,   g over the readable past segments i (or the best k) and the running one

Written the way the equations are (eq. 9, 10, 16, 17): the torch twin also is what the reference backend runs. The
Triton kernels read every state once, where it is stored and as it is stored (bf16, int8), and have no gradient.
"""

import torch

from ..read.gates import missing_in_triton, token_gates
from ..shared.ops import choose_backend, needs_gradient, register_op


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes from -7 to 7, int8 `[..., n]` with n even, as bytes `[..., n / 2]`, uint8: the first of two is the low
    half, and 8 is added to each.

    Raises:
        ValueError: n is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"states of width {codes.shape[-1]} cannot be stored as int4, allowed: even widths")
    low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def unpack(stored: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`, int8."""
    return torch.stack([stored & 15, stored >> 4], -1).flatten(-2).to(torch.int8) - 8


def fetch(
    stored: torch.Tensor,
    scale: torch.Tensor | None,
    index: torch.Tensor | None,
    like: torch.Tensor,
    where: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Stored states `[B, S, H, ...]` with the dtype and device of `like`, or of these only the slots `index`
    `[B, H, k]`, `[B, k, H, ...]`. `scale`: what int8 states, and those of `pack`, are to be multiplied with. `where`:
    both are a pool `[P, n, H, ...]`, and these the block and the place in it of every slot, `[B, S]` int64 each."""

    def get(t: torch.Tensor) -> torch.Tensor:
        if index is not None:
            slot = index.to(t.device).transpose(1, 2)
            row = torch.arange(slot.shape[0], device=t.device)[:, None, None]
            place = (row, slot) if where is None else tuple(x[row, slot] for x in where)
            t = t[(*place, torch.arange(slot.shape[2], device=t.device))]
        elif where is not None:
            t = t[where]
        return t.to(like.device)

    states = get(stored)
    states = (unpack(states) if states.dtype == torch.uint8 else states).to(like.dtype)
    return states if scale is None else states * get(scale)


def weigh(gates: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """`[B, H, dv]`, the sum of answers `[B, S, H, dv]` times gates `[B, H, S]`."""
    return (gates[:, :, None] @ answers.transpose(1, 2))[:, :, 0]


def decode_step_torch(
    q: torch.Tensor,
    u: torch.Tensor,
    online: torch.Tensor,
    online_logit: torch.Tensor,
    states: torch.Tensor,
    scale: torch.Tensor | None,
    summaries: torch.Tensor,
    visible: torch.Tensor,
    index: torch.Tensor | None,
    top_k: int,
    function: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `decode_step`; the second result is empty unless slots were chosen here."""
    gates, online_gate, slots = token_gates(u, online_logit, summaries, visible, index, top_k, function)
    chosen = fetch(states, scale, slots, online)
    past = weigh(gates, (q[:, None, :, None] @ chosen)[..., 0, :])
    out = torch.addcmul(past, online_gate[..., None], (q[..., None, :] @ online)[..., 0, :])
    return out, slots if top_k and index is None else visible.new_empty(0, dtype=torch.int64)


def _fake(q, u, online, online_logit, states, scale, summaries, visible, index, top_k, function):
    chosen = (*q.shape[:2], top_k) if top_k and index is None else (0,)
    return online.new_empty(*q.shape[:2], online.shape[-1]), visible.new_empty(chosen, dtype=torch.int64)


decode_step_op = register_op("decode_step", decode_step_torch, fake=_fake, triton="step.decode_triton")


def decode_step(
    q: torch.Tensor,
    u: torch.Tensor,
    online: torch.Tensor,
    online_logit: torch.Tensor,
    states: torch.Tensor,
    scale: torch.Tensor | None,
    summaries: torch.Tensor,
    visible: torch.Tensor,
    index: torch.Tensor | None = None,
    top_k: int = 0,
    function: str = "softmax",
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Answer one token per row from the running memory and the finished ones.

    Args:
        q: `[B, H, dk]`, in the dtype of `online`. u: `[B, H, du]`, any float dtype.
        online: `[B, H, dk, dv]`, fp32 or float64, the running state that already holds the token.
        online_logit: `[B, H]`. states: `[B, S, H, dk, dv]` finished segments, in any dtype, with `scale`
            `[B, S, H, dk, 1]` if they are int8 or packed (uint8, `[B, S, H, dk, dv / 2]`); they may be stored on
            another device.
        summaries: `[B, S, H, m, du]`, m sub-block means each. visible: `[B, S]` bool, those that a row may read.
        top_k: 0 = read all, else the number of best ones. index: `[B, H, K]` int64, slots to read instead, or -1; with
            top_k.
        function: what turns logits into gates, a name of `gates.GATE_FUNCTIONS`.
        backend: "auto", "triton" or "torch", see `choose_backend`. Triton has no gradient and cannot read states that
            are packed or stored elsewhere: there torch runs, whatever is asked for.

    Returns:
        answers `[B, H, dv]` in the dtype of `online`, and the slots that were read `[B, H, K]`, -1 where fewer can be;
        None for all.

    Raises:
        ValueError: an unknown gate function, or "triton" is not available.
    """
    inputs = (q, u, online, online_logit, states, scale, summaries, visible, index, top_k, function)
    widths, missing = (*online.shape[-2:], u.shape[-1]), missing_in_triton(function)
    backend = choose_backend(backend, "decode_step", q, *widths, missing=missing)
    readable = states.device == q.device and states.dtype != torch.uint8
    if backend == "triton" and readable and not needs_gradient(*inputs):
        out, chosen = decode_step_op(*inputs, "triton")
    else:
        out, chosen = decode_step_torch(*inputs)
    return out, None if not top_k else chosen if index is None else index
