"""What every op shares: the dtype it computes in, and its registration with `torch.library`.

`kernels/` has no `__init__.py`: Transformers probes for the PyPI package `kernels`, and a regular package of that name
in the working directory would be found instead of it.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Callable

import torch


# of the ops: the package's name, so that a flat copy of these files (a Hub repository) has ops of its own beside ours
NAMESPACE = re.sub(r"\W", "_", __name__.removesuffix(".kernels.shared.ops"))
# in front of the names of modules of kernels/, and what stands between folder and module: "_" in a flat copy
KERNELS, DOT = __name__.removesuffix("ops")[: -len("shared.")], __name__[-len("ops") - 1]
WIDEST, WIDEST_DEEP = 256, 128  # head width up to which the Triton kernels (of deep memories) are written
HAS_TRITON = importlib.util.find_spec("triton") is not None
OPS: dict[str, str | None] = {}  # every op that is registered, and the module of its Triton kernels
PLAIN: dict[Callable, Callable] = {}  # registered ops, and the functions of PyTorch that they are made of


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """States, gates and accumulation: fp32 for every half precision, float64 stays float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widest(device: torch.device) -> torch.dtype:
    """float64, or fp32 on a device that has no wider floats (Apple's GPUs)."""
    return torch.float32 if device.type == "mps" else torch.float64


def budget(device: torch.device, elements: int) -> int:
    """Elements of the largest temporaries of one block: small enough for a CPU's caches, large enough for a GPU."""
    return elements if device.type == "cpu" else elements * 64


def unobserved() -> bool:
    """Whether the host cannot look at values now: `torch.compile` traces, or a CUDA graph is captured."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def running_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`x.cumsum(dim)` that a GPU can do under `torch.use_deterministic_algorithms`, where its own raises: sums of
    2, 4, 8, ... neighbours. Autograd looks through it."""
    if not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(dim)
    step, size = 1, x.shape[dim]
    while step < size:
        before = torch.zeros_like(x.narrow(dim, 0, step))
        x = x + torch.cat([before, x.narrow(dim, 0, size - step)], dim)
        step *= 2
    return x


def triton_interpreted() -> bool:
    """Whether Triton runs on the CPU, for tests: it reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _no_triton(x: torch.Tensor, widths: tuple[int, ...], widest: int) -> str | None:
    """Why the Triton kernels cannot take these inputs, or None."""
    if not HAS_TRITON:
        return "the package `triton` is not installed"
    if x.device.type != "cuda" and not (x.device.type == "cpu" and triton_interpreted()):
        return f"Triton has no device {x.device.type!r} (set TRITON_INTERPRET=1 to try it on the CPU)"
    if x.device.type == "cuda" and torch.version.hip is None:
        found = torch.cuda.get_device_properties(x.device)
        if found.major < 8:
            return f"the GPU has compute capability {found.major}.{found.minor}, allowed: 8.0 and later"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the dtype is {x.dtype}, allowed: float32, float16, bfloat16"
    if max(widths) > widest:
        return f"a head is {max(widths)} wide, allowed: up to {widest}"
    return None


def choose_backend(
    requested: str, op: str, x: torch.Tensor, *widths: int, widest: int = WIDEST, missing: str | None = None
) -> str:
    """The implementation of `op`, "triton" or "torch", for inputs like `x` and heads of `widths`.

    Args:
        requested: `MCConfig.mc_backend`; "auto" is torch; "qualified", what a layer asks for whose Triton kernels were
            found to be right and faster here, is Triton where it is available.
        widest: of the widths that the op's kernels are written for. missing: what else they cannot do, in words.

    Raises:
        ValueError: "triton" is requested and not available.
    """
    if requested not in ("triton", "qualified"):
        return "torch"
    problem = missing or _no_triton(x, widths, widest)
    if problem is not None and requested == "qualified":
        return "torch"
    if problem is not None:
        raise ValueError(f"`mc_backend`='triton' is not possible for `{op}`: {problem}; allowed here: 'torch', 'auto'")
    return "triton"


def _with_backend(function: Callable, module: str, name: str) -> Callable:
    """`function` with one more argument, the backend: "triton" runs `name` of the module `module` of kernels/."""
    count = len(inspect.signature(function).parameters)

    def run(*args):
        if args[count:] == ("triton",):
            return getattr(importlib.import_module(KERNELS + module.replace(".", DOT)), name)(*args[:count])
        return function(*args[:count])

    return run


def needs_gradient(*inputs: object) -> bool:
    """Whether a gradient may be asked for with respect to any tensor among the inputs."""
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def _custom_op(
    name: str, function: Callable, fake: Callable, triton: str | None, role: str, mutates: tuple[str, ...] = ()
) -> Callable:
    """An op from a function with annotated arguments; with `triton`, its last argument is the backend."""
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    count = len(inspect.signature(function).parameters)
    if triton is not None:
        schema = schema.replace(") -> ", ', str backend="torch") -> ')
        function = _with_backend(function, triton, role)
    op = torch.library.custom_op(
        f"{NAMESPACE}::{name}", without_autocast(function), mutates_args=mutates, schema=schema
    )
    op.register_fake(lambda *args: fake(*args[:count]))
    PLAIN[op._opoverload] = function
    return op


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """A region without autocast; the meta device, on which sizes are computed, knows none."""
    # torch.compile of torch 2.11 and before cannot look through the questions, and never compiles for meta
    if not torch.compiler.is_compiling():
        kind = device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_autocast(function: Callable) -> Callable:
    """`function` with autocast off: an op chooses the dtype of its products itself, also inside an autocast region."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with autocast_off(next(x.device for x in args if isinstance(x, torch.Tensor))):
            return function(*args, **kwargs)

    return run


def register_op(
    name: str,
    forward: Callable,
    backward: Callable | None = None,
    fake: Callable | None = None,
    fake_backward: Callable | None = None,
    differentiable: int = 0,
    triton: str | None = None,
    mutates: tuple[str, ...] = (),
    keeps: int = 0,
) -> Callable:
    """Register `forward`, and `backward` as its gradient, as ops that `torch.compile` and `torch.export` see through.

    Args:
        forward: `(inputs...) -> tensors`, with annotated tensor arguments first.
        backward: `(one gradient per output, inputs...) -> one gradient per differentiable input`; an input that is
            None gets an empty tensor. The gradient of an output that nothing used is zero, or None where its
            annotation allows that.
        fake, fake_backward: the same with shapes and dtypes only.
        differentiable: how many of the leading inputs receive a gradient.
        triton: the module of kernels/, such as "read.segment_triton", whose `forward` and `backward` do the same on
            Triton. The op then has one more argument, "torch" or "triton" (see `choose_backend`).
        mutates: names of the tensors that `forward` changes in place; such an op has no `backward`.
        keeps: how many of the leading outputs `backward` takes behind the inputs.
    """
    OPS[name] = triton
    op = _custom_op(name, forward, fake, triton, "forward", mutates)
    if backward is None:
        return op
    backward_op = _custom_op(f"{name}_backward", backward, fake_backward, triton, "backward")
    parameters = inspect.signature(backward).parameters
    takes_none = [parameter.annotation == torch.Tensor | None for parameter in parameters.values()]

    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.outputs_meta = [(o.shape, o.dtype, o.device) for o in outputs]
        ctx.is_tensor = [isinstance(x, torch.Tensor) for x in inputs]
        ctx.rest = [None if isinstance(x, torch.Tensor) else x for x in inputs]
        ctx.save_for_backward(*outputs[:keeps], *(x for x in inputs if isinstance(x, torch.Tensor)))

    def gradient(ctx, *grads):
        saved = ctx.saved_tensors  # asked for once: checkpointing gives it once
        kept, tensors = saved[:keeps], iter(saved[keeps:])
        inputs = [next(tensors) if given else rest for given, rest in zip(ctx.is_tensor, ctx.rest, strict=True)]
        full = [None if grad is None else grad.contiguous() for grad in grads]
        for i, (shape, dtype, device) in enumerate(ctx.outputs_meta):
            if full[i] is None and not takes_none[i]:
                full[i] = torch.zeros(shape, dtype=dtype, device=device)
        count = len(inspect.signature(backward).parameters) - len(full) - keeps  # behind them: the backend
        results = backward_op(*full, *inputs[:count], *kept, *inputs[count:])
        results = [results] if isinstance(results, torch.Tensor) else list(results)
        grads = [r if ctx.is_tensor[i] and ctx.needs_input_grad[i] else None for i, r in enumerate(results)]
        return (*grads, *[None] * (len(ctx.rest) - differentiable))

    op.register_autograd(gradient, setup_context=setup_context)
    return op
