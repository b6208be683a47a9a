"""`linear_write` on Triton. One kernel does everything that has the form

    y_t = sum_{s <= t} D_ts (a_t . b_s) c_s  +  D_t (a_t^T B)          D_ts = prod_{s < j <= t} a_j

for a unit of at most 512 slots, sub-chunk by sub-chunk, with the state on chip:

    answers           a, b, c = q, k, v     state  S         forward in time
    gradient of q     a, b, c = do, v, k    state  S^T       forward
    gradient of k     a, b, c = v, do, q    state  dS^T      backward, decay of the slot after
    gradient of v     a, b, c = k, q, do    state  dS        backward, decay of the slot after

A unit is a segment, or a piece of a long one. Where units depend on each other (`carry`, pieces), the kernel first
runs for the states alone, `_carry_kernel` passes them from unit to unit, and then all units run at once.
Gradient of the decay: docs/kernels.md.
"""

import torch
import triton
import triton.language as tl

from ..shared.ops import running_sum
from ..shared.triton import OLDER, chip, dot, dot_precision, launch, narrow, operand_dtype, power_of_two, split_dot


LONGEST = 512  # slots of a unit: longer segments are cut into pieces
PIECE = 256
LEAST_LOG = tl.constexpr(-30.0)  # a decay below e^-30 forgets everything in fp32, and its log sums stay finite
NEVER, FIRST, EVERY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # which units have a state of their own


@triton.jit(do_not_specialize=["num_segments", "width", "pieces", "size", "flow_stride"])
def _unit_kernel(
    a,
    b,
    c,
    log_decay,
    begin,
    x,
    y,
    end,
    flow,
    num_segments,
    width,
    heads,
    pieces,
    size,
    flow_stride,
    DA: tl.constexpr,
    DC: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    CHUNK: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    WRITE: tl.constexpr,
    FLOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Programs: (row, segment, piece, head, block of DC). States are fp32 `[units, heads, DA, DC]`, or their
    transpose. FLOW also gives x_t . y_t per token and block, and takes factors in two parts so that y is exact."""
    blocks = (DC + BC - 1) // BC
    block, program = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    unit = tl.cast(program // heads, tl.int64)  # (row * num_segments + segment) * pieces + piece
    head = program % heads
    segment, piece = unit // pieces, unit % pieces
    length = tl.minimum(width - piece * size, size).to(tl.int32)
    first_token = segment * width + piece * size
    o_a, o_c = tl.arange(0, BA), block * BC + tl.arange(0, BC)
    m_a, m_c = o_a < DA, o_c < DC
    operand = b.dtype.element_ty

    if TRANSPOSED:
        o_state = o_c[None, :] * DA + o_a[:, None]
    else:
        o_state = o_a[:, None] * DC + o_c[None, :]
    m_state = m_a[:, None] & m_c[None, :]
    b_state = tl.zeros((BA, BC), tl.float32)
    if BEGIN == EVERY:
        b_state += tl.load(begin + (unit * heads + head) * DA * DC + o_state, mask=m_state, other=0.0)
    row, is_first = unit // (num_segments * pieces), unit % (num_segments * pieces) == 0
    if BEGIN == FIRST:
        if is_first:
            b_state += tl.load(begin + (row * heads + head) * DA * DC + o_state, mask=m_state, other=0.0)

    o_t = tl.arange(0, CHUNK)
    for start in range(0, length, CHUNK):
        if REVERSE:  # the same sub-chunks, last first
            o_slot = (length - 1) // CHUNK * CHUNK - start + CHUNK - 1 - o_t
        else:
            o_slot = start + o_t
        m_t = o_slot < length
        row_of = (first_token + o_slot) * heads + head
        o_ta, m_ta = row_of[:, None] * DA + o_a[None, :], m_t[:, None] & m_a[None, :]
        o_tc, m_tc = row_of[:, None] * DC + o_c[None, :], m_t[:, None] & m_c[None, :]
        b_b = tl.load(b + o_ta, mask=m_ta, other=0.0)  # [CHUNK, BA]
        b_c = tl.load(c + o_tc, mask=m_tc, other=0.0)  # [CHUNK, BC]
        if DECAY:
            if REVERSE:
                b_log = tl.load(log_decay + row_of + heads, mask=o_slot + 1 < length, other=0.0)
            else:
                b_log = tl.load(log_decay + row_of, mask=m_t, other=0.0)
            b_log = tl.maximum(b_log.to(tl.float32), LEAST_LOG)
            b_sum = tl.cumsum(b_log, 0)
            b_total = tl.sum(b_log, 0)

        if WRITE:
            b_a = tl.load(a + o_ta, mask=m_ta, other=0.0)
            if FLOW:
                b_y = split_dot(b_a, b_state, None, PRECISION)  # [CHUNK, BC]
            else:
                b_y = dot(b_a, narrow(b_state, operand), None, PRECISION)
            causal = o_t[:, None] >= o_t[None, :]
            b_scores = dot(b_a, tl.trans(b_b), None, PRECISION)  # [CHUNK, CHUNK]
            if DECAY:
                b_y *= tl.exp(b_sum)[:, None]
                b_scores *= tl.exp(tl.where(causal, b_sum[:, None] - b_sum[None, :], float("-inf")))
            else:
                b_scores = tl.where(causal, b_scores, 0.0)
            if FLOW:
                b_y = split_dot(b_scores, b_c, b_y, PRECISION)
                b_x = tl.load(x + o_tc, mask=m_tc, other=0.0)
                b_flow = tl.sum(b_x.to(tl.float32) * b_y, 1)
                tl.store(flow + tl.cast(block, tl.int64) * flow_stride + row_of, b_flow, mask=m_t)
            else:
                b_y = dot(narrow(b_scores, operand), b_c, b_y, PRECISION)
            tl.store(y + o_tc, narrow(b_y, y.dtype.element_ty), mask=m_tc)

        if DECAY:
            b_state *= tl.exp(b_total)
            b_state = split_dot(tl.trans(b_b), b_c * tl.exp(b_total - b_sum)[:, None], b_state, PRECISION)
        else:
            b_state = dot(tl.trans(b_b), b_c, b_state, PRECISION)

    if DECAY and REVERSE:  # from the first slot's state to the one before it
        b_first = tl.load(log_decay + first_token * heads + head).to(tl.float32)
        b_state *= tl.exp(tl.maximum(b_first, LEAST_LOG))
    if END == EVERY:
        tl.store(end + (unit * heads + head) * DA * DC + o_state, b_state, mask=m_state)
    if END == FIRST:
        if is_first:
            tl.store(end + (row * heads + head) * DA * DC + o_state, b_state, mask=m_state)


@triton.jit(do_not_specialize=["units", "pieces"])
def _carry_kernel(
    local,
    decay,
    extra,
    initial,
    starts,
    begin,
    final,
    units,
    pieces,
    heads,
    size,
    DECAY: tl.constexpr,
    EXTRA: tl.constexpr,
    INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`begin[u] = state`, `state = decay[u] * state + local[u]`, for all units u of a row in order, zero at `starts`;
    REVERSE: backwards, and `extra` joins the state after every segment. Programs: (row, head) x elements."""
    row, head = tl.cast(tl.program_id(0) // heads, tl.int64), tl.program_id(0) % heads
    o_e = tl.cast(tl.program_id(1), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < size
    b_state = tl.zeros((BLOCK,), tl.float32)
    if INITIAL:
        b_state += tl.load(initial + (row * heads + head) * size + o_e, mask=m_e, other=0.0)
    for step in range(0, units):
        if REVERSE:
            place = units - 1 - step
            border = place + 1
            known = step > 0
        else:
            place = step
            border = place
            known = step >= 0
        unit = row * units + place
        keep = tl.load(starts + row * units + border, mask=known, other=0) == 0
        b_state = tl.where(keep, b_state, 0.0)
        if EXTRA:
            last = place % pieces == pieces - 1
            o_extra = ((unit // pieces) * heads + head) * size + o_e
            if last:
                b_state += tl.load(extra + o_extra, mask=m_e, other=0.0)
        o_unit = (unit * heads + head) * size + o_e
        tl.store(begin + o_unit, b_state, mask=m_e)
        b_local = tl.load(local + o_unit, mask=m_e, other=0.0)
        if DECAY:
            b_state = tl.load(decay + unit * heads + head) * b_state + b_local
        else:
            b_state += b_local
    if REVERSE:
        keep = tl.load(starts + row * units) == 0
        tl.store(final + (row * heads + head) * size + o_e, tl.where(keep, b_state, 0.0), mask=m_e)


class _Units:
    """The units of a grid `[R, N, W, H, d]`, and the two kernels over them."""

    def __init__(
        self, grid: torch.Tensor, log_decay: torch.Tensor | None, starts: torch.Tensor | None, carry: bool
    ) -> None:
        self.rows, self.segments, self.width, self.heads = grid.shape[:4]
        self.log_decay, self.starts, self.carry, self.device = log_decay, starts, carry, grid.device
        self.unit = self.width if self.width <= LONGEST else PIECE
        self.pieces = -(-self.width // self.unit)
        self.per_row = self.segments * self.pieces
        self.chained = self.pieces > 1 or (carry and self.segments > 1)

    def run(self, a, b, c, begin=None, x=None, end="every", reverse=False, transposed=False, write=True):
        """y like c, end states (`end`: of "every" unit, of the "first" of each row, or of "no" unit), and the flow.

        `begin` holds a state per unit `[R, U, H, ...]` or per row `[R, H, ...]`.
        """
        key, value = b.shape[-1], c.shape[-1]
        chunk, block, warps = _tile(b, x is not None)
        block = block if write else block // 2  # the states alone: with the whole block ptxas spills
        block = min(block, power_of_two(value))
        blocks = triton.cdiv(value, block)
        y = torch.empty_like(c) if write else None
        flow = b.new_empty(blocks, *b.shape[:-1], dtype=torch.float32) if x is not None else None
        leading = (self.rows, self.per_row, self.heads) if end == "every" else (self.rows, self.heads)
        state = (value, key) if transposed else (key, value)
        end_states = None if end == "no" else b.new_empty(*leading, *state, dtype=torch.float32)
        args = {
            "a": a,
            "b": b,
            "c": c,
            "log_decay": self.log_decay,
            "begin": begin,
            "x": x,
            "y": y,
            "end": end_states,
            "flow": flow,
            "num_segments": self.segments,
            "width": self.width,
            "heads": self.heads,
            "pieces": self.pieces,
            "size": self.unit,
            "flow_stride": b.shape[:-1].numel(),
        }
        meta = {
            "DA": key,
            "DC": value,
            "BA": power_of_two(key),
            "BC": block,
            "CHUNK": chunk,
            "DECAY": self.log_decay is not None,
            "REVERSE": reverse,
            "TRANSPOSED": transposed,
            "BEGIN": (NEVER if begin is None else EVERY if begin.dim() == 5 else FIRST).value,
            "END": {"no": NEVER, "first": FIRST, "every": EVERY}[end].value,
            "WRITE": write,
            "FLOW": x is not None,
            "PRECISION": dot_precision(b),
        }
        programs = self.rows * self.per_row * self.heads * blocks
        launch(_unit_kernel, (programs,), args, meta, warps, 2)
        return y, end_states, None if flow is None else flow.sum(0)

    def pass_on(self, local, initial=None, extra=None, reverse=False):
        """The state before every unit (reverse: its gradient after), and the gradient of the initial state."""
        size = local.shape[-2:].numel()
        begin = torch.empty_like(local)
        final = local.new_empty(self.rows, self.heads, *local.shape[-2:]) if reverse else None
        args = {
            "local": local,
            "decay": self._unit_decay(),
            "extra": extra,
            "initial": initial,
            "starts": self._unit_starts(),
            "begin": begin,
            "final": final,
            "units": self.per_row,
            "pieces": self.pieces,
            "heads": self.heads,
            "size": size,
        }
        meta = {
            "DECAY": self.log_decay is not None,
            "EXTRA": extra is not None,
            "INITIAL": initial is not None,
            "REVERSE": reverse,
            "BLOCK": 256,
        }
        grid = (self.rows * self.heads, triton.cdiv(size, meta["BLOCK"]))
        launch(_carry_kernel, grid, args, meta, 2, 1)
        return begin, final

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """`[R, N, W, H]` to `[R, U, slots, H]`, with zeros behind the last slot of a segment."""
        x = torch.nn.functional.pad(x, (0, 0, 0, self.pieces * self.unit - self.width))
        return x.view(self.rows, self.per_row, self.unit, self.heads)

    def _unit_decay(self) -> torch.Tensor | None:
        """`[R, U, H]`, decay over whole units."""
        return None if self.log_decay is None else self.cut(self.log_decay.float()).sum(2).exp()

    def _unit_starts(self) -> torch.Tensor:
        """`[R, U]` int8, units that start from zero."""
        starts = torch.zeros(self.rows, self.segments, self.pieces, dtype=torch.int8, device=self.device)
        if self.starts is not None:
            starts[:, :, 0] = self.starts
        if not self.carry:
            starts[:, 1:, 0] = 1
        return starts.view(self.rows, self.per_row)

    def mask_first(self, state: torch.Tensor) -> torch.Tensor:
        """`[R, H, ...]`, zero where a row starts from zero."""
        return state if self.starts is None else state.masked_fill(self.starts[:, 0, None, None, None], 0.0)


def _tile(like: torch.Tensor, exact: bool) -> tuple[int, int, int]:
    """Slots of a sub-chunk, block of the value width and warps: no register is spilled (compile_table.json)."""
    width, on = like.shape[-1], chip(like)
    key = power_of_two(width)
    if like.dtype == torch.float32:
        return 16, 32, 4
    if on == "amd":
        return (16 if key > 128 else 32), 64, 4
    if on in OLDER:
        return {64: (32, 32 if exact else 64, 4), 128: (32, 32, 8), 256: (16, 16 if exact else 32, 8)}[max(key, 64)]
    if exact:
        return {64: (32, 64, 4), 128: (32, 64, 8), 256: (16, 32, 8)}[max(key, 64)]
    return {64: (64, 64, 4), 128: (64 if width == key else 32, 64, 8), 256: (16, 64, 8)}[max(key, 64)]


def _prepare(q, k, v, log_decay, initial, starts, carry):
    """Contiguous operands of one dtype, the units, and the state before each of them (None: zero)."""
    dtype = operand_dtype(q, k, v)
    q, k, v = (x.to(dtype).contiguous() for x in (q, k, v))
    units = _Units(q, None if log_decay is None else log_decay.contiguous(), starts, carry)
    begin = None if initial is None else units.mask_first(initial.float()).contiguous()
    if units.chained:
        _, local, _ = units.run(None, k, v, write=False)
        begin, _ = units.pass_on(local, begin)
    return q, k, v, units, begin


def forward(q, k, v, log_decay, initial, starts, carry):
    """See `linear_write`."""
    dtype = q.dtype
    q, k, v, units, begin = _prepare(q, k, v, log_decay, initial, starts, carry)
    out, ends, _ = units.run(q, k, v, begin)
    return out.to(dtype), ends[:, units.pieces - 1 :: units.pieces].contiguous()


def backward(grad_out, grad_ends, q, k, v, log_decay, initial, starts, carry):
    """See `linear_write_backward_torch`."""
    dtypes = q.dtype, k.dtype, v.dtype
    q, k, v, units, begin = _prepare(q, k, v, log_decay, initial, starts, carry)
    go, after, grad_initial = grad_out.to(q.dtype).contiguous(), grad_ends.float().contiguous(), None
    if units.chained:
        _, local, _ = units.run(None, q, go, reverse=True, write=False)
        after, grad_initial = units.pass_on(local, extra=after, reverse=True)
    x = (None, None) if log_decay is None else (q, k)
    grad_q, _, flow_in = units.run(go, v, k, begin, x[0], end="no", transposed=True)
    end = "no" if begin is None else "every" if begin.dim() == 5 else "first"
    grad_k, grad_begin, flow_out = units.run(v, go, q, after, x[1], end, reverse=True, transposed=True)
    grad_v, _, _ = units.run(k, q, go, after, end="no", reverse=True)
    grad_log = none = q.new_empty(0)
    if log_decay is not None:
        grad_log = _decay_gradient(units, begin, grad_begin, flow_in - flow_out).to(log_decay.dtype)
    if initial is None:
        grad_initial = none.clone()
    else:
        grad_initial = units.mask_first(grad_begin if grad_initial is None else grad_initial).to(initial.dtype)
    grads = (grad.to(dtype) for grad, dtype in zip((grad_q, grad_k, grad_v), dtypes, strict=True))
    return *grads, grad_log, grad_initial


def _decay_gradient(units: _Units, begin, grad_begin, flow: torch.Tensor) -> torch.Tensor:
    """Gradient `[R, N, W, H]` of log a: what crosses a slot is what came into its unit, less what was read before the
    slot, plus what was written there. `flow` is read less written."""
    flow = units.cut(flow)
    crossing = flow - running_sum(flow, 2)
    if begin is not None:
        entered = (begin * grad_begin).sum((-1, -2))  # [R, U, H], or [R, H] for the first unit of each row
        if begin.dim() == 5:
            crossing += entered[:, :, None]
        else:
            crossing[:, 0] += entered[:, None]
    return crossing.view(units.rows, units.segments, -1, units.heads)[:, :, : units.width].contiguous()
