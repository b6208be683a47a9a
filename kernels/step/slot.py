"""Some rows of a batch of states get other values: a finished segment moves into its slot of the cache, the running
state starts anew, a row without a token keeps what it had.

    target[b, slot[b, l]] = source[b, l]      where rows[b, l] is set; everything else stays as it is

The Triton kernel changes `target` itself and reads and writes nothing of the other rows. Torch reads and writes all of
them, unless no row is set at all, which it can ask on a CPU only without waiting.
"""

import torch

from ..shared.ops import choose_backend, needs_gradient, register_op, unobserved


def _written(
    target: torch.Tensor, source: torch.Tensor, slot: torch.Tensor | None, rows: torch.Tensor, overwrite: bool
) -> torch.Tensor:
    """See `slot_write`."""
    if rows.device.type == "cpu" and not unobserved() and not rows.any():
        return target
    source = source.to(target.device, target.dtype)
    rows = rows.to(target.device)[(..., *[None] * (target.dim() - 2))]
    if slot is None:
        return torch.where(rows, source, target)
    slot = slot.to(target.device).clamp(max=target.shape[1] - 1)  # of rows that are not set it may be any
    place = (torch.arange(len(target), device=target.device)[:, None], slot)
    source = torch.where(rows, source, target[place])
    return target.index_put_(place, source) if overwrite else target.index_put(place, source)


def slot_write_torch(
    target: torch.Tensor, source: torch.Tensor, slot: torch.Tensor | None, rows: torch.Tensor
) -> None:
    """See `slot_write`; changes `target`."""
    target.copy_(_written(target, source, slot, rows, True))


slot_write_op = register_op(
    "slot_write", slot_write_torch, fake=lambda *_: None, triton="step.slot_triton", mutates=("target",)
)


def slot_write(
    target: torch.Tensor,
    source: torch.Tensor,
    slot: torch.Tensor | None,
    rows: torch.Tensor,
    overwrite: bool,
    backend: str = "auto",
) -> torch.Tensor:
    """`target` with `source` in one slot each of some rows.

    Args:
        target: `[B, S, ...]`, any dtype and device. source: `[B, L, ...]`, or of size 1 where it is the same for all
            rows or levels; fp32 or another float dtype for Triton.
        slot: `[B, L]` int64, another one for each l; None: l itself, with L = S.
        rows: `[B, L]` bool, what is written. The slot of a row with L = 1 that is not may be any.
        overwrite: `target` may be changed, and with a slot is what is returned.
        backend: "auto", "triton" or "torch", see `choose_backend`. Triton has no gradient, always overwrites, and
            reaches no other device: where it cannot run torch runs, whatever is asked for.
    """
    backend = choose_backend(backend, "slot_write", source, 1)
    reached = target.device == source.device and target.is_contiguous()
    if backend == "triton" and overwrite and reached and not needs_gradient(target, source):
        slot_write_op(target, source, slot, rows, "triton")
        return target
    return _written(target, source, slot, rows, overwrite)
