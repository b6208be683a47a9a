"""The classic cells over a batch of sequences, by torch's fused RNNs (cuDNN on a GPU).

    LSTM:  c_t = f_t c_{t-1} + i_t g_t,   h_t = o_t tanh(c_t)            GRU:  h_t = (1 - z_t) n_t + z_t h_{t-1}

Weights have the shapes, and gates the order, of `torch.nn.LSTM` and `torch.nn.GRU`. Outside `torch.compile` this is
plain autograd. The compiler does not take fused RNNs, so for it they are an op, whose backward runs them once more.
"""

import warnings

import torch

from ..shared.ops import NAMESPACE, compute_dtype, without_autocast


SATURATED = 1e4  # a pre-activation whose sigmoid is exactly 0 or 1


@without_autocast
def recurrence_torch(
    x: torch.Tensor,
    input_weight: torch.Tensor,
    hidden_weight: torch.Tensor,
    input_bias: torch.Tensor,
    hidden_bias: torch.Tensor,
    hidden: torch.Tensor,
    cell: torch.Tensor | None,
    empty: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `recurrence`."""
    dtype = compute_dtype(x)
    weights = [w.to(dtype) for w in (input_weight, hidden_weight, input_bias, hidden_bias)]
    x, hidden = x.to(dtype), hidden.to(dtype).contiguous()[None]  # cuDNN refuses a state with gaps
    rest = (True, 1, 0.0, torch.is_grad_enabled(), False, True)  # biases, layers, dropout, train, 2 ways, batch first
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        if cell is None:
            out, _ = torch.gru(x, hidden, weights, *rest)
            return out.contiguous(), out.new_empty(0)
        if empty is not None:  # one more input channel, which opens the forget gate and shuts the input gate
            mark = x.new_tensor([-SATURATED, SATURATED, 0.0, 0.0]).repeat_interleave(hidden.shape[-1])
            weights[0] = torch.cat([weights[0], mark[:, None]], -1)
            x = torch.cat([x, empty[..., None].to(dtype)], -1)
        out, _, last = torch.lstm(x, (hidden, cell.to(dtype).contiguous()[None]), weights, *rest)
        return out.contiguous(), last[0]


def recurrence_backward_torch(
    grad_out: torch.Tensor,
    grad_cell: torch.Tensor,
    x: torch.Tensor,
    input_weight: torch.Tensor,
    hidden_weight: torch.Tensor,
    input_bias: torch.Tensor,
    hidden_bias: torch.Tensor,
    hidden: torch.Tensor,
    cell: torch.Tensor | None,
    empty: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of all inputs but `empty` (an empty tensor where `cell` is None)."""
    inputs = [x, input_weight, hidden_weight, input_bias, hidden_bias, hidden] + ([] if cell is None else [cell])
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in inputs]
        outputs = recurrence_torch(*inputs, *([None] if cell is None else []), empty)
    num = 1 if cell is None else 2
    grads = torch.autograd.grad(outputs[:num], inputs, (grad_out, grad_cell)[:num])
    return tuple(g.contiguous() for g in grads) + ((x.new_empty(0),) if cell is None else ())


def _fake(x, input_weight, hidden_weight, input_bias, hidden_bias, hidden, cell, empty):
    dtype = compute_dtype(x)
    last = x.new_empty(0, dtype=dtype) if cell is None else x.new_empty(cell.shape, dtype=dtype)
    return x.new_empty(*x.shape[:2], hidden.shape[-1], dtype=dtype), last


def _fake_backward(grad_out, grad_cell, x, input_weight, hidden_weight, input_bias, hidden_bias, hidden, cell, empty):
    inputs = (x, input_weight, hidden_weight, input_bias, hidden_bias, hidden, cell)
    return tuple(x.new_empty(0) if t is None else x.new_empty(t.shape, dtype=t.dtype) for t in inputs)


def _setup_context(ctx, inputs, output) -> None:
    ctx.is_tensor = [t is not None for t in inputs]
    ctx.save_for_backward(*(t for t in inputs if t is not None))


def _backward(ctx, grad_out, grad_cell):
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if given else None for given in ctx.is_tensor]
    grads = getattr(torch.ops, NAMESPACE).recurrence_backward(grad_out.contiguous(), grad_cell.contiguous(), *inputs)
    kept = [
        g if given and need else None
        for g, given, need in zip(grads, ctx.is_tensor, ctx.needs_input_grad, strict=False)
    ]
    return (*kept, None)


def _register() -> None:
    """Define both ops from scratch: the kernel of a `torch.library.custom_op` runs with autograd shut off, and the
    backward needs it. A module that is loaded again keeps the ops that it has."""
    if hasattr(getattr(torch.ops, NAMESPACE), "recurrence"):
        return
    for name, function, fake in (
        ("recurrence", recurrence_torch, _fake),
        ("recurrence_backward", recurrence_backward_torch, _fake_backward),
    ):
        name = f"{NAMESPACE}::{name}"
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(name, ("cpu", "cuda"), function)
        torch.library.register_fake(name, fake)
    torch.library.register_autograd(f"{NAMESPACE}::recurrence", _backward, setup_context=_setup_context)


_register()


def recurrence(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    cell: torch.Tensor | None = None,
    empty: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run an LSTM, or a GRU when there is no `cell`, over every sequence.

    Args:
        x: `[B, W, in]`, any float dtype. weights: as in `torch.nn.LSTM` or `torch.nn.GRU`, `[G * D, in]`, `[G * D, D]`
            and two biases `[G * D]`.
        hidden, cell: `[B, D]`, the state before the first slot.
        empty: `[B, W]` bool, slots that leave the cell of an LSTM as it is; None = no slot.

    Returns:
        h of every slot `[B, W, D]` (without meaning in empty slots) and the LSTM's last c `[B, D]`, in fp32 (float64
        for float64 input).
    """
    run = getattr(torch.ops, NAMESPACE).recurrence if torch.compiler.is_compiling() else recurrence_torch
    return run(x, *weights, hidden, cell, empty)
