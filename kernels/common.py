"""What every op shares: the dtype it computes in, and its registration with `torch.library`.

`kernels/` has no `__init__.py`: Transformers probes for the PyPI package `kernels`, and a regular package of that name
in the working directory would be found instead of it.
"""

import functools
import inspect
from collections.abc import Callable

import torch


NAMESPACE = "mc_transformers"


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """States, gates and accumulation: fp32 for every half precision, float64 stays float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(function: Callable) -> Callable:
    """`function` with autocast off: an op chooses the dtype of its products itself, also inside an autocast region."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def register_op(
    name: str,
    forward: Callable,
    backward: Callable | None = None,
    fake: Callable | None = None,
    fake_backward: Callable | None = None,
    differentiable: int = 0,
) -> Callable:
    """Register `forward`, and `backward` as its gradient, as ops that `torch.compile` and `torch.export` see through.

    Args:
        forward: `(inputs...) -> tensors`, with annotated tensor arguments first.
        backward: `(one gradient per output, inputs...) -> one gradient per differentiable input`; an input that is
            None gets an empty tensor. Arguments named `saved_*` between the two stand for the outputs of `forward`.
        fake, fake_backward: the same with shapes and dtypes only.
        differentiable: how many of the leading inputs receive a gradient.
    """
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", without_autocast(forward), mutates_args=())
    op.register_fake(fake)
    if backward is None:
        return op
    backward_op = torch.library.custom_op(
        f"{NAMESPACE}::{name}_backward", without_autocast(backward), mutates_args=()
    )
    backward_op.register_fake(fake_backward)
    num_inputs = len(inspect.signature(forward).parameters)
    takes_outputs = any(name.startswith("saved_") for name in inspect.signature(backward).parameters)

    def setup_context(ctx, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.outputs_meta = [(o.shape, o.dtype, o.device) for o in outputs]
        ctx.is_tensor = [isinstance(x, torch.Tensor) for x in inputs]
        ctx.rest = [None if isinstance(x, torch.Tensor) else x for x in inputs]
        saved = list(outputs) if takes_outputs else []
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)), *saved)

    def gradient(ctx, *grads):
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if given else rest for given, rest in zip(ctx.is_tensor, ctx.rest, strict=True)]
        full = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad.contiguous()
            for grad, (shape, dtype, device) in zip(grads, ctx.outputs_meta, strict=True)
        ]
        results = backward_op(*full, *tensors, *inputs)
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        kept = [r if ctx.is_tensor[i] and ctx.needs_input_grad[i] else None for i, r in enumerate(results)]
        return (*kept, *[None] * (num_inputs - differentiable))

    op.register_autograd(gradient, setup_context=setup_context)
    return op
