"""What all Triton kernels share: how they are launched and tuned, and the products of small and large blocks.

This module, and every other `triton_*` module, is imported when the first op runs on Triton, never by the package.
Kernel names: `b_*` blocks on chip, `p_*` pointers, `o_*` offsets, `m_*` masks; shapes in trailing comments.
"""

import contextlib
import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .common import triton_interpreted


INTERPRETED = triton_interpreted()
# called with (kernel, arguments, meta) instead of a launch: offline compilation sees what would run
recorder: Callable | None = None


@functools.lru_cache(maxsize=None)
def _tuned(kernel, configs: tuple, names: tuple[str, ...], restore: tuple[str, ...]):
    choices = []
    for config in configs:
        blocks = {key: value for key, value in config if key not in ("num_warps", "num_stages")}
        options = {key: value for key, value in config if key in ("num_warps", "num_stages")}
        choices.append(triton.Config(blocks, **options))
    return triton.autotune(choices, key=list(names), restore_value=list(restore), cache_results=True)(kernel)


def launch(
    kernel, grid: Callable, args: dict, meta: dict, configs: list[dict], accumulates: tuple[str, ...] = ()
) -> None:
    """Run `kernel` with the fastest of `configs`, measured once per set of `meta` (widths and flags, never lengths).

    Args:
        grid: from all constants to the number of programs. args: pointers and run-time integers by name.
        meta: compile-time constants by name. configs: block sizes, num_warps and num_stages; the first one is taken
            where there is nothing to measure (interpreter, deterministic mode, offline compilation).
        accumulates: tensors that the kernel adds to, which measuring must not change.
    """
    if recorder is not None:
        for config in configs:
            recorder(kernel, args, {**meta, **config})
        return
    device = next(x.device for x in args.values() if isinstance(x, torch.Tensor))
    guard = contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)
    with guard:
        if INTERPRETED or len(configs) == 1 or torch.are_deterministic_algorithms_enabled():
            kernel[grid](**args, **meta, **configs[0])
        else:
            choices = tuple(tuple(sorted(config.items())) for config in configs)
            _tuned(kernel, choices, tuple(sorted(meta)), accumulates)[grid](**args, **meta)


def power_of_two(width: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(width))


def split_width(width: int) -> int:
    """Block size for a dimension that products sum over: it covers 16 ... 256 with little padding and few blocks."""
    for block in (128, 64, 32, 16):
        if width % block == 0 and width // block <= 4:
            return block
    return min(128, power_of_two(width))


def operand_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """What products are computed from: a half precision if any input has one, else fp32."""
    return next((x.dtype for x in tensors if x.dtype != torch.float32), torch.float32)


def dot_precision() -> str:
    """How fp32 operands are multiplied: what `torch.set_float32_matmul_precision` says."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def split_dot(b_x, b_y, PRECISION: tl.constexpr):
    """Product of x [M, K] in the operand dtype and fp32 y [K, N] that loses nothing of y: gates decide between
    memories, and logits have no bound."""
    if b_x.dtype == tl.float32:
        return tl.dot(b_x, b_y, input_precision=PRECISION)
    else:
        b_high = b_y.to(b_x.dtype)
        b_low = (b_y - b_high.to(tl.float32)).to(b_x.dtype)
        return tl.dot(b_x, b_low, tl.dot(b_x, b_high))
