"""One more token in the running state of a matrix memory: S read once, written once.

    S' = a S + b k v^T + b2 k2 v2^T            or, by the delta rule,            S' = a S + b k (v - a S^T k)^T

This is `Memory.step` of the matrix memories (eq. 4, 28). The Triton kernel has no gradient; torch has.
"""

import torch

from ..shared.ops import choose_backend, needs_gradient, register_op, without_autocast


@without_autocast
def state_step_torch(
    state: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None,
    write: torch.Tensor | None,
    k2: torch.Tensor | None,
    v2: torch.Tensor | None,
    write2: torch.Tensor | None,
    delta: bool,
) -> torch.Tensor:
    """See `state_step`."""
    k, v = k.to(state.dtype), v.to(state.dtype)
    if log_decay is not None:
        state = log_decay.exp()[..., None, None] * state
    if delta:
        v = v - (k[..., None, :] @ state)[..., 0, :]
    if write is not None:
        v = v * write[..., None]
    state = torch.addcmul(state, k[..., :, None], v[..., None, :])
    if k2 is None:
        return state
    return torch.addcmul(state, k2[..., :, None], (v2 * write2[..., None])[..., None, :])


def _fake(state, k, v, log_decay, write, k2, v2, write2, delta):
    return torch.empty_like(state, memory_format=torch.contiguous_format)


state_step_op = register_op("state_step", state_step_torch, fake=_fake, triton="step.state_triton")


def state_step(
    state: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor | None = None,
    write: torch.Tensor | None = None,
    again: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    delta: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """The running states with one more token each, in a new tensor.

    Args:
        state: `[B, H, dk, dv]`, fp32 or float64. k: `[B, H, dk]`, v: `[B, H, dv]`, any float dtype.
        log_decay: `[B, H]`, log a; None = 0. write: `[B, H]`, b; None = 1. Both in the dtype of `state`.
        again: k2 `[B, H, dk]`, v2 `[B, H, dv]` and b2 `[B, H]` of another pair, in the dtype of `state`.
        delta: write v minus what the decayed state answers to k, as the delta rule does.
        backend: "auto", "triton" or "torch", see `choose_backend`. Triton has no gradient: where one is needed torch
            runs, whatever is asked for.
    """
    inputs = (state, k, v, log_decay, write, *(again or (None, None, None)), delta)
    backend = choose_backend(backend, "state_step", state, *state.shape[-2:])
    if backend == "triton" and not needs_gradient(*inputs):
        return state_step_op(*inputs, "triton")
    return state_step_torch(*inputs)
