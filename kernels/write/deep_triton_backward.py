"""Backward of `deep_write` on Triton: the chunks in reverse, from the stacks of all chunk starts that the forward
kernel has left. One program per row and head; the gradients of its stack are fp32 scratch, updated in place.

A chunk is passed four times, block of hidden units by block, as every sum over all hidden units stands between what it
is made of and what it is needed for:

    1  r, then n, e, d1                 3  through answers and end: gradients of T, d1, d2
    2  the answers' r, then their n     4  through d1: gradients of the maps C
"""

import triton
import triton.language as tl

from ..shared.deep_triton import (
    WHOLE,
    gelu,
    gelu_curvature,
    gelu_slope,
    hidden_tokens,
    keys_of,
    load_maps,
    load_mix,
    load_part,
    load_tokens,
    norm_parameters,
    normalize,
    normalize_backward,
    store_maps,
    store_tokens,
)
from ..shared.triton import dot


@triton.jit
def _normalize_backward_twice(b_grad, b_weighted, b_n, b_rstd, D: tl.constexpr, BD: tl.constexpr, NORM: tl.constexpr):
    """Gradient of r from that of `normalize_backward(weighted)`, which depends on r through n and s."""
    b_spread = normalize_backward(b_weighted, b_n, b_rstd, D, BD, NORM)
    b_first, b_second = tl.sum(b_grad * b_n, 1) / D, tl.sum(b_weighted * b_n, 1) / D
    b_grad_n = -(b_grad * b_second[:, None] + b_weighted * b_first[:, None]) * b_rstd[:, None]
    b_grad_s = -tl.sum(b_grad * b_spread, 1) * b_rstd
    return normalize_backward(b_grad_n, b_n, b_rstd, D, BD, NORM) + b_grad_s[:, None] * b_n / D


@triton.jit
def _block(x, first, start, H: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr):
    """Pointers [BC, BH] and mask of a block of what one program keeps for a chunk `[BC, H]`."""
    o_h = start + tl.arange(0, BH)
    return x + first + tl.arange(0, BC)[:, None] * H + o_h[None, :], (o_h < H)[None, :]


@triton.jit
def _through_part(
    b_grad,
    b_x,
    b_t,
    b_grad_t,
    b_grad_enter,
    enter,
    cell,
    m_c,
    part: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    ENTER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Backward of `(enter x) T` of one part T, from the gradient of the answer: that of x; those of T and of `enter`
    are added."""
    b_back = dot(b_grad, tl.trans(b_t), None, PRECISION)
    if ENTER:
        b_enter = load_part(enter, cell, part, m_c, J, C, BC)[:, None]
        b_found = tl.sum(b_x * b_back, 1)
        b_grad_enter += tl.where(tl.arange(0, 2)[None, :] == part, b_found[:, None], 0.0)
        b_back, b_x = b_back * b_enter, b_x * b_enter
    return b_back, dot(tl.trans(b_x), b_grad, b_grad_t, PRECISION), b_grad_enter


@triton.jit(do_not_specialize=["first_row", "chunks", "group_size", "slots"])
def write_backward_kernel(
    q,
    k,
    v,
    mix,
    enter,
    leave,
    trans,
    stack2,
    stack1,
    scale,
    shift,
    run,
    last,
    grad_out,
    grad_c2_end,
    grad_c1_end,
    grad_stack2,
    grad_stack1,
    kept,
    grad_q,
    grad_k,
    grad_v,
    grad_mix,
    grad_enter,
    grad_leave,
    grad_trans,
    grad_norm,
    first_row,
    chunks,
    heads,
    group_size,
    slots,
    D: tl.constexpr,
    H: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    J: tl.constexpr,
    NORM: tl.constexpr,
    DOT: tl.constexpr,
    READ: tl.constexpr,
    ENTER: tl.constexpr,
    TRANS: tl.constexpr,
    SEPARATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`kept`: five `[BC, H]` per program. `grad_stack`: J parts, and one more for the C of the first chunk if it is
    SEPARATE; they start as the gradients of the last stack. `grad_norm`: scale and shift, per program. Programs: (row,
    head)."""
    local = tl.cast(tl.program_id(0), tl.int64)
    row, head = first_row + local // heads, local % heads
    o_c, o_j, o_jj = tl.arange(0, BC), tl.arange(0, 2), tl.arange(0, 4)
    m_c = o_c < C
    b_scale, b_shift = norm_parameters(scale, shift, head, D, BD, NORM)
    b_grad_scale, b_grad_shift = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    group = row // group_size
    keep = tl.load(run + group) == row % group_size
    kept_chunk = tl.load(last + group)
    size: tl.constexpr = D * H
    parts: tl.constexpr = J + SEPARATE
    own = local * 5 * BC * H
    for number in range(0, chunks):
        index = chunks - 1 - number
        cell = (row * chunks + index) * heads + head
        first = (row * chunks + index) * C * heads + head
        slot = local * slots + index
        base, base_part = slot, 0
        if SEPARATE:
            base = tl.where(index == 0, local * slots + slots - 1, slot)
            base_part = tl.where(index == 0, J, 0)
        p_c2, p_c1 = stack2 + base * J * size, stack1 + base * J * size
        # ------------------------------------------------------------------------------------------------ pass 1
        b_k, b_v = load_tokens(k, first, heads, m_c, D, BD, BC), load_tokens(v, first, heads, m_c, D, BD, BC)
        b_n, b_rstd, b_e, b_d1 = keys_of(
            b_k, b_v, p_c2, p_c1, b_scale, b_shift, D, H, BD, BH, BC, NORM, DOT, PRECISION
        )
        b_mix = load_mix(mix, cell, m_c, C, BC)
        if READ == WHOLE or READ == 0:
            b_q = load_tokens(q, first, heads, m_c, D, BD, BC)
            b_similar = dot(b_q, tl.trans(b_k), None, PRECISION)  # [BC, BC]
            b_scores = b_similar * b_mix
        # ------------------------------------------------------------------------------------------------ pass 2
        b_r, b_products = tl.zeros((BC, BD), tl.float32), tl.zeros((BC, BC), tl.float32)
        for start in range(0, H, BH):
            b_c2, b_c1 = load_maps(p_c2, p_c1, start, D, H, BD, BH)
            b_k = load_tokens(k, first, heads, m_c, D, BD, BC)
            b_z = dot(b_k, b_c2, None, PRECISION)
            b_p = dot(b_d1, tl.trans(b_c1), None, PRECISION)
            p_kept, m_kept = _block(kept, own, start, H, BH, BC)
            tl.store(p_kept, b_z, mask=m_kept)
            tl.store(p_kept + BC * H, b_p, mask=m_kept)
            if READ == WHOLE:
                b_q = load_tokens(q, first, heads, m_c, D, BD, BC)
                b_hidden = -dot(b_scores, gelu_slope(b_z) * b_p, None, PRECISION)
                for part in tl.static_range(J):
                    o_part = (slot * J + part) * size
                    b_t2, b_t1 = load_maps(stack2 + o_part, stack1 + o_part, start, D, H, BD, BH)
                    b_answer = dot(b_q, b_t2, None, PRECISION)
                    if ENTER:
                        b_answer *= load_part(enter, cell, part, m_c, J, C, BC)[:, None]
                    b_hidden += b_answer
                tl.store(p_kept + 2 * BC * H, b_hidden, mask=m_kept)
                b_hidden = gelu(b_hidden)
                for part in tl.static_range(J):
                    o_part = (slot * J + part) * size
                    b_t2, b_t1 = load_maps(stack2 + o_part, stack1 + o_part, start, D, H, BD, BH)
                    b_answer = dot(b_hidden, b_t1, None, PRECISION)
                    if ENTER:
                        b_answer *= load_part(enter, cell, part, m_c, J, C, BC)[:, None]
                    b_r += b_answer
            if READ == 1:
                p_in, m_in = hidden_tokens(q, first, heads, start, m_c, H, BH, BC)
                b_hidden = tl.load(p_in, mask=m_in, other=0.0).to(tl.float32)
            if READ == WHOLE or READ == 1:
                b_products = dot(b_hidden, tl.trans(gelu(b_z)), b_products, PRECISION)
        tl.debug_barrier()
        # ------------------------------------------------------------------------------------------------ pass 3
        b_grad_q, b_grad_k = tl.zeros((BC, BD), tl.float32), tl.zeros((BC, BD), tl.float32)
        b_grad_d1 = tl.zeros((BC, BD), tl.float32)
        b_first, b_second = tl.zeros((BC, BC), tl.float32), tl.zeros((BC, BC), tl.float32)
        b_grad_enter, b_grad_leave = tl.zeros((BC, 2), tl.float32), tl.zeros((BC, 2), tl.float32)
        b_grad_trans = tl.zeros((4,), tl.float32)
        if READ == WHOLE or READ == 1:
            b_grad_r = load_tokens(grad_out, first, heads, m_c, D, BD, BC)
            if READ == WHOLE:
                b_grad_q = b_grad_r
                b_answer_n, b_answer_rstd = normalize(
                    b_r - dot(b_products * b_mix, b_d1, None, PRECISION), D, BD, NORM
                )
                b_grad_scale += tl.sum(b_grad_r * b_answer_n, 0)
                b_grad_shift += tl.sum(b_grad_r, 0)
                b_grad_n = b_grad_r * b_scale[None, :]
                b_grad_r = normalize_backward(b_grad_n, b_answer_n, b_answer_rstd, D, BD, NORM)
            b_first = -dot(b_grad_r, tl.trans(b_d1), None, PRECISION)  # gradient of products * mix
            b_grad_d1 = -dot(tl.trans(b_products * b_mix), b_grad_r, None, PRECISION)
        for start in range(0, H, BH):
            p_kept, m_kept = _block(kept, own, start, H, BH, BC)
            b_z = tl.load(p_kept, mask=m_kept, other=0.0)
            b_p = tl.load(p_kept + BC * H, mask=m_kept, other=0.0)
            b_a, b_slope = gelu(b_z), gelu_slope(b_z)
            b_d2 = b_slope * b_p
            b_grad_a, b_grad_d2 = tl.zeros((BC, BH), tl.float32), tl.zeros((BC, BH), tl.float32)
            b_t2, b_t1, b_grad_t2, b_grad_t1 = (), (), (), ()
            for part in tl.static_range(J):
                o_part = (slot * J + part) * size
                b_part2, b_part1 = load_maps(stack2 + o_part, stack1 + o_part, start, D, H, BD, BH)
                b_t2, b_t1 = b_t2 + (b_part2,), b_t1 + (b_part1,)
                o_part = (local * parts + part) * size
                b_part2, b_part1 = load_maps(grad_stack2 + o_part, grad_stack1 + o_part, start, D, H, BD, BH)
                b_grad_t2, b_grad_t1 = b_grad_t2 + (b_part2,), b_grad_t1 + (b_part1,)
            b_k = load_tokens(k, first, heads, m_c, D, BD, BC)
            for part in tl.static_range(J):  # the end of the chunk
                b_leave = load_part(leave, cell, part, m_c, J, C, BC)[:, None]
                b_along1 = dot(b_d1, tl.trans(b_grad_t1[part]), None, PRECISION)
                b_along2 = dot(b_d2, tl.trans(b_grad_t2[part]), None, PRECISION)
                b_grad_a -= b_leave * b_along1
                b_grad_k -= b_leave * b_along2
                b_found = tl.sum(b_along1 * b_a, 1) + tl.sum(b_along2 * b_k, 1)
                b_grad_leave -= tl.where(o_j[None, :] == part, b_found[:, None], 0.0)
                b_grad_d1 -= b_leave * dot(b_a, b_grad_t1[part], None, PRECISION)
                b_grad_d2 -= b_leave * dot(b_k, b_grad_t2[part], None, PRECISION)
            b_new2, b_new1 = b_grad_t2, b_grad_t1
            if TRANS:
                b_new2, b_new1 = (), ()
                for part in tl.static_range(J):
                    b_part2, b_part1 = tl.zeros((BD, BH), tl.float32), tl.zeros((BH, BD), tl.float32)
                    for other in tl.static_range(J):
                        b_factor = tl.load(trans + cell * J * J + other * J + part)
                        b_part2 += b_factor * b_grad_t2[other]
                        b_part1 += b_factor * b_grad_t1[other]
                        b_along = tl.sum(tl.sum(b_grad_t2[other] * b_t2[part], 1), 0)
                        b_along += tl.sum(tl.sum(b_grad_t1[other] * b_t1[part], 1), 0)
                        b_grad_trans += tl.where(o_jj == other * J + part, b_along, 0.0)
                    b_new2, b_new1 = b_new2 + (b_part2,), b_new1 + (b_part1,)
            tl.debug_barrier()  # nothing that follows is fetched earlier
            if READ == WHOLE:  # the second map of the answers
                b_in = tl.load(p_kept + 2 * BC * H, mask=m_kept, other=0.0)
                b_hidden = gelu(b_in)
            if READ == 1:
                p_in, m_in = hidden_tokens(q, first, heads, start, m_c, H, BH, BC)
                b_hidden = tl.load(p_in, mask=m_in, other=0.0).to(tl.float32)
            if READ == WHOLE or READ == 1:
                b_through = b_first * b_mix
                b_grad_hidden = dot(b_through, b_a, None, PRECISION)
                b_grad_a = dot(tl.trans(b_through), b_hidden, b_grad_a, PRECISION)
                b_sums = ()
                for part in tl.static_range(J):
                    o_part = (slot * J + part) * size
                    _, b_part1 = load_maps(stack2 + o_part, stack1 + o_part, start, D, H, BD, BH)
                    b_back, b_sum, b_grad_enter = _through_part(
                        b_grad_r,
                        b_hidden,
                        b_part1,
                        b_new1[part],
                        b_grad_enter,
                        enter,
                        cell,
                        m_c,
                        part,
                        J,
                        C,
                        BC,
                        ENTER,
                        PRECISION,
                    )
                    b_grad_hidden += b_back
                    b_sums = b_sums + (b_sum,)
                b_new1 = b_sums
            if READ == 1:
                p_in, m_in = hidden_tokens(grad_q, first, heads, start, m_c, H, BH, BC)
                tl.store(p_in, b_grad_hidden.to(grad_q.dtype.element_ty), mask=m_in)
            if READ == WHOLE:  # and the first
                b_grad_in = b_grad_hidden * gelu_slope(b_in)
            if READ == 0:
                p_in, m_in = hidden_tokens(grad_out, first, heads, start, m_c, H, BH, BC)
                b_grad_in = tl.load(p_in, mask=m_in, other=0.0).to(tl.float32)
            if READ == WHOLE or READ == 0:
                b_second -= dot(b_grad_in, tl.trans(b_d2), None, PRECISION)
                b_grad_d2 -= dot(tl.trans(b_scores), b_grad_in, None, PRECISION)
                b_q = load_tokens(q, first, heads, m_c, D, BD, BC)
                b_sums = ()
                for part in tl.static_range(J):
                    o_part = (slot * J + part) * size
                    b_part2, _ = load_maps(stack2 + o_part, stack1 + o_part, start, D, H, BD, BH)
                    b_back, b_sum, b_grad_enter = _through_part(
                        b_grad_in,
                        b_q,
                        b_part2,
                        b_new2[part],
                        b_grad_enter,
                        enter,
                        cell,
                        m_c,
                        part,
                        J,
                        C,
                        BC,
                        ENTER,
                        PRECISION,
                    )
                    b_grad_q += b_back
                    b_sums = b_sums + (b_sum,)
                b_new2 = b_sums
            _, b_c1 = load_maps(p_c2, p_c1, start, D, H, BD, BH)
            b_grad_p = b_grad_d2 * b_slope
            b_grad_d1 = dot(b_grad_p, b_c1, b_grad_d1, PRECISION)
            tl.debug_barrier()  # all of the block is read before any of it is written
            tl.store(p_kept + 3 * BC * H, b_grad_a * b_slope + gelu_curvature(b_z) * b_p * b_grad_d2, mask=m_kept)
            tl.store(p_kept + 4 * BC * H, b_grad_p, mask=m_kept)
            for part in tl.static_range(J):
                o_part = (local * parts + part) * size
                store_maps(grad_stack2 + o_part, grad_stack1 + o_part, b_new2[part], b_new1[part], start, D, H, BD, BH)
        tl.debug_barrier()
        # ------------------------------------------------------------------------------------------------ pass 4
        if READ == WHOLE or READ == 0:
            b_through = b_second * b_mix
            b_grad_q = dot(b_through, b_k, b_grad_q, PRECISION)
            b_grad_k = dot(tl.trans(b_through), b_q, b_grad_k, PRECISION)
            b_second *= b_similar
            store_tokens(grad_q, b_grad_q, first, heads, m_c, D, BD, BC)
        if READ == WHOLE or READ == 1:
            b_second += b_first * b_products
        b_grad_e = normalize_backward(b_grad_d1, b_n, b_rstd, D, BD, NORM)
        b_grad_r = tl.zeros((BC, BD), tl.float32)
        if NORM:
            b_grad_r = _normalize_backward_twice(b_grad_d1, b_e * b_scale[None, :], b_n, b_rstd, D, BD, NORM)
            b_grad_scale += tl.sum(b_e * b_grad_e, 0)
            b_grad_e *= b_scale[None, :]
        if not DOT:
            b_grad_e *= 2.0
            b_grad_k += b_grad_e
            b_grad_scale += tl.sum(b_grad_e * b_n, 0)
            b_grad_shift += tl.sum(b_grad_e, 0)
            b_grad_r += normalize_backward(b_grad_e * b_scale[None, :], b_n, b_rstd, D, BD, NORM)
        store_tokens(grad_v, -b_grad_e, first, heads, m_c, D, BD, BC)
        o_base = (local * parts + base_part) * size
        for start in range(0, H, BH):
            p_kept, m_kept = _block(kept, own, start, H, BH, BC)
            b_z = tl.load(p_kept, mask=m_kept, other=0.0)
            b_grad_z = tl.load(p_kept + 3 * BC * H, mask=m_kept, other=0.0)
            b_grad_p = tl.load(p_kept + 4 * BC * H, mask=m_kept, other=0.0)
            b_c2, b_c1 = load_maps(p_c2, p_c1, start, D, H, BD, BH)
            b_grad_z += gelu_slope(b_z) * dot(b_grad_r, tl.trans(b_c1), None, PRECISION)
            b_grad_k = dot(b_grad_z, tl.trans(b_c2), b_grad_k, PRECISION)
            b_grad_c2, b_grad_c1 = load_maps(grad_stack2 + o_base, grad_stack1 + o_base, start, D, H, BD, BH)
            if keep & (index == kept_chunk):
                o_end = (group * heads + head) * size
                b_end2, b_end1 = load_maps(grad_c2_end + o_end, grad_c1_end + o_end, start, D, H, BD, BH)
                b_grad_c2 += b_end2
                b_grad_c1 += b_end1
            b_k = load_tokens(k, first, heads, m_c, D, BD, BC)
            b_grad_c2 = dot(tl.trans(b_k), b_grad_z, b_grad_c2, PRECISION)
            b_grad_c1 = dot(tl.trans(b_grad_p), b_d1, b_grad_c1, PRECISION)
            b_grad_c1 = dot(tl.trans(gelu(b_z)), b_grad_r, b_grad_c1, PRECISION)
            tl.debug_barrier()
            store_maps(grad_stack2 + o_base, grad_stack1 + o_base, b_grad_c2, b_grad_c1, start, D, H, BD, BH)
        store_tokens(grad_k, b_grad_k, first, heads, m_c, D, BD, BC)
        m_mix = m_c[:, None] & m_c[None, :]
        tl.store(grad_mix + cell * C * C + o_c[:, None] * C + o_c[None, :], b_second, mask=m_mix)
        o_part, m_part = cell * C * J + o_c[:, None] * J + o_j[None, :], m_c[:, None] & (o_j < J)[None, :]
        tl.store(grad_leave + o_part, b_grad_leave, mask=m_part)
        if ENTER:
            tl.store(grad_enter + o_part, b_grad_enter, mask=m_part)
        if TRANS:
            tl.store(grad_trans + cell * J * J + o_jj, b_grad_trans, mask=o_jj < J * J)
        tl.debug_barrier()  # the next chunk reads what other threads have written
    if NORM:
        o_d = tl.arange(0, BD)
        tl.store(grad_norm + local * 2 * D + o_d, b_grad_scale, mask=o_d < D)
        tl.store(grad_norm + local * 2 * D + D + o_d, b_grad_shift, mask=o_d < D)
