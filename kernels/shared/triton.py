"""What all Triton kernels share: how they are launched, and the products of small and large blocks.

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
LENGTHS = ["begin", "count", "num", "memories", "part_stride", "token_stride"]
OPTIONS = {"enable_fp_fusion": True}  # Triton's default will change; the table of compiled kernels has it
SHARED = 160 * 1024  # bytes that a program may have on the GPUs of data centres; others have 99 KiB
OLDER = ("ampere", "small")  # chips with the tensor cores of sm_80
# offline compilation: `recorder` is called with (kernel, arguments, meta) instead of a launch, for a chip of `target`
recorder: Callable | None = None
target: str | None = None


def launch(kernel, grid: tuple[int, ...], args: dict, meta: dict, warps: int, stages: int) -> None:
    """Run `kernel`.

    Args:
        grid: numbers of programs. args: pointers (None where a flag says unused) and run-time integers by name.
        meta: compile-time constants by name, widths and flags. warps, stages: Triton's num_warps and num_stages.
    """
    meta = meta | {"num_warps": warps, "num_stages": stages}
    if recorder is not None:
        recorder(kernel, args, meta)
        return
    device = next(x.device for x in args.values() if isinstance(x, torch.Tensor))
    with contextlib.nullcontext() if device.type == "cpu" else torch.cuda.device(device):
        kernel[grid](**args, **meta, **OPTIONS)


@functools.cache
def _chip(device: torch.device) -> str:
    if device.type == "cpu":
        return "hopper"
    if torch.version.hip is not None:
        return "amd"
    found = torch.cuda.get_device_properties(device)
    if found.shared_memory_per_block_optin < SHARED:
        return "small"
    return "ampere" if found.major < 9 else "hopper" if found.major == 9 else "blackwell"


def chip(x: torch.Tensor) -> str:
    """What blocks are chosen for: "ampere", "hopper", "blackwell", "small" (99 KiB of shared memory: RTX, L4, L40S),
    or "amd" (64 KiB)."""
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
    if chip(x) == "amd":
        return "ieee"
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "tf32x3"


@triton.jit
def narrow(b_x, dtype: tl.constexpr):
    """fp32 to the operand or output dtype, to nearest."""
    if INTERPRETED and dtype == tl.bfloat16:  # it truncates
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_x = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return b_x.to(dtype)


@triton.jit
def nearest_tf32(b_x):
    """Tensor cores cut an operand's last 13 bits off, which makes every product too small."""
    if INTERPRETED:
        return ((b_x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    else:
        return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [b_x], tl.float32, is_pure=True, pack=1)


@triton.jit
def dot(b_x, b_y, b_sum, PRECISION: tl.constexpr):
    """`b_sum + b_x @ b_y`, accumulated in fp32; b_sum may be None."""
    if PRECISION == "tf32" and b_x.dtype == tl.float32:
        b_x, b_y = nearest_tf32(b_x), nearest_tf32(b_y)
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
