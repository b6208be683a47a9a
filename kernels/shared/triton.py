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

from .ops import triton_interpreted


INTERPRETED = tl.constexpr(triton_interpreted())
# arguments that differ from text to text: no kernel is compiled once more because of their values
LENGTHS = ["begin", "count", "num", "memories"]
# offline compilation: `recorder` is called with (kernel, arguments, meta) instead of a launch, for a chip of `target`
recorder: Callable | None = None
target: str | None = None


@functools.cache
def _tuned(kernel, configs: tuple, names: tuple[str, ...], accumulates: tuple[str, ...]):
    choices = []
    for blocks, warps, stages in configs:
        choices.append(triton.Config(dict(blocks), num_warps=warps, num_stages=stages))
    return triton.autotune(choices, key=list(names), restore_value=list(accumulates), cache_results=True)(kernel)


def launch(
    kernel,
    grid: Callable[[dict], tuple[int, ...]],
    args: dict,
    meta: dict,
    configs: list[tuple[dict, int, int]],
    accumulates: tuple[str, ...] = (),
) -> None:
    """Run `kernel` with the fastest of `configs`, measured once per set of `meta` (widths and flags, never lengths).

    Args:
        grid: from all constants to the numbers of programs. args: pointers (None where a flag says unused) and
            run-time integers by name. meta: compile-time constants by name.
        configs: more constants, num_warps and num_stages. The first one is taken where there is nothing to measure
            (interpreter, deterministic mode).
        accumulates: tensors that the kernel adds to, which measuring must not change.
    """
    if recorder is not None:
        for blocks, warps, stages in configs:
            recorder(kernel, args, {**meta, **blocks, "num_warps": warps, "num_stages": stages})
        return
    device = next(x.device for x in args.values() if isinstance(x, torch.Tensor))
    guard = contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device)
    with guard:
        if INTERPRETED.value or len(configs) == 1 or torch.are_deterministic_algorithms_enabled():
            blocks, warps, stages = configs[0]
            kernel[grid](**args, **meta, **blocks, num_warps=warps, num_stages=stages)
        else:
            choices = tuple((tuple(blocks.items()), warps, stages) for blocks, warps, stages in configs)
            _tuned(kernel, choices, tuple(sorted(meta)), accumulates)[grid](**args, **meta)


@functools.cache
def _chip(device: torch.device) -> str:
    if device.type == "cpu":
        return "hopper"
    if torch.version.hip is not None:
        return "amd"
    major, _ = torch.cuda.get_device_capability(device)
    return "ampere" if major < 9 else "hopper" if major == 9 else "blackwell"


def chip(x: torch.Tensor) -> str:
    """What blocks are chosen for: "ampere", "hopper", "blackwell" or later, or "amd" (64 KiB of shared memory)."""
    return target or _chip(x.device)


def power_of_two(width: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(width))


def split_width(width: int, largest: int = 128) -> int:
    """Block size for a dimension that products sum over: few blocks, and 96 = 3 * 32, 48 = 3 * 16 without padding."""
    for block in (128, 64, 32, 16):
        if block <= largest and width % block == 0 and width // block <= 4:
            return block
    return min(largest, power_of_two(width))


def operand_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """What products are computed from: a half precision if any input has one, else fp32."""
    return next((x.dtype for x in tensors if x.dtype != torch.float32), torch.float32)


def dot_precision(x: torch.Tensor) -> str:
    """How fp32 operands like x are multiplied: what `torch.backends.fp32_precision` says, and what was asked for by
    `torch.set_float32_matmul_precision` (whose getter raises once the first was set). "tf32x3" is as accurate as
    fp32, on NVIDIA's tensor cores. Half precisions do not ask."""
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee" if chip(x) == "amd" else "tf32x3"


@triton.jit
def narrow(b_x, dtype: tl.constexpr):
    """fp32 to the operand or output dtype, to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # it truncates
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_x = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return b_x.to(dtype)


@triton.jit
def dot(b_x, b_y, b_sum, PRECISION: tl.constexpr):
    """`b_sum + b_x @ b_y`, accumulated in fp32; b_sum may be None."""
    if INTERPRETED:  # it multiplies the bit patterns of bfloat16
        b_x, b_y = b_x.to(tl.float32), b_y.to(tl.float32)
    return tl.dot(b_x, b_y, b_sum, input_precision=PRECISION)


@triton.jit
def split_dot(b_x, b_y, b_sum, PRECISION: tl.constexpr):
    """`b_sum + b_x @ b_y` of an fp32 factor and one of the operand dtype, which loses nothing of the first: a half
    precision takes it in two parts."""
    if b_x.dtype == b_y.dtype:
        return dot(b_x, b_y, b_sum, PRECISION)
    elif b_x.dtype == tl.float32:
        b_high = narrow(b_x, b_y.dtype)
        b_low = narrow(b_x - b_high.to(tl.float32), b_y.dtype)
        return dot(b_low, b_y, dot(b_high, b_y, b_sum, PRECISION), PRECISION)
    else:
        b_high = narrow(b_y, b_x.dtype)
        b_low = narrow(b_y - b_high.to(tl.float32), b_x.dtype)
        return dot(b_x, b_low, dot(b_x, b_high, b_sum, PRECISION), PRECISION)
