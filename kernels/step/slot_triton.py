"""`slot_write` on Triton: a program of a row that is not written ends after one load."""

import torch
import triton
import triton.language as tl

from ..shared.triton import launch, narrow


BLOCK = 2048  # elements of a program


@triton.jit(do_not_specialize=["slots"])
def _slot_kernel(
    target,
    source,
    slot,
    rows,
    levels,
    slots,
    size,
    stride_row,
    stride_level,
    BLOCK: tl.constexpr,
    SLOTTED: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """UNIFORM: source holds one number per row and level. Programs: (row, level) x blocks of what a slot holds."""
    pair = tl.cast(tl.program_id(0), tl.int64)
    if tl.load(rows + pair) != 0:
        row, level = pair // levels, pair % levels
        place = row * slots
        if SLOTTED:
            place += tl.minimum(tl.load(slot + pair), slots - 1)
        else:
            place += level
        o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = o_x < size
        p_source = source + row * stride_row + level * stride_level
        if UNIFORM:
            b_x = tl.load(p_source + o_x * 0, mask=mask, other=0)
        else:
            b_x = tl.load(p_source + o_x, mask=mask, other=0)
        if b_x.dtype != target.dtype.element_ty:
            b_x = narrow(b_x.to(tl.float32), target.dtype.element_ty)
        tl.store(target + place * size + o_x, b_x, mask=mask)


def forward(target, source, slot, rows):
    """See `slot_write`."""
    levels = rows.shape[1]
    source = source.expand(len(target), levels, *target.shape[2:])
    strides = zip(source.stride()[2:], source.shape[2:], strict=True)
    uniform = all(stride == 0 or length == 1 for stride, length in strides)
    if not (uniform or source[0, 0].is_contiguous()):
        source = source.contiguous()
    size = target[0, 0].numel()
    args = {
        "target": target,
        "source": source,
        "slot": None if slot is None else slot.contiguous(),
        "rows": rows.contiguous().view(torch.int8),
        "levels": levels,
        "slots": target.shape[1],
        "size": size,
        "stride_row": source.stride(0),
        "stride_level": source.stride(1),
    }
    meta = {"BLOCK": BLOCK, "SLOTTED": slot is not None, "UNIFORM": uniform}
    launch(_slot_kernel, (rows.numel(), triton.cdiv(size, BLOCK)), args, meta, 4, 1)
