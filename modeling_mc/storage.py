# Copyright 2026 the mc-transformers authors.
"""Where a memory layer's tensors are kept between two forwards, and in which form."""

from collections.abc import Callable, Iterable

import torch

from ..kernels.step.decode import fetch, pack
from ..kernels.step.slot import slot_write
from .memories import State


INT4 = "int4"  # torch has no such dtype: two codes per byte
ZEROS = 0x88  # the byte of two
LARGEST = {torch.int8: 127, INT4: 7}  # codes of quantised states, of either sign


class Storage:
    """The tensors of one memory layer by name, each with the batch as its first dimension.

    Attributes:
        tensors: `[B, ...]` each.
        num_tokens: how many tokens were read into them, padding included.
        kept_dtype: how states of finished segments (`kept.i`) are stored: None (as computed), a float dtype, or
            torch.int8 or "int4", with one scale per row of a state (`scale.i`).
        kept_device: where those states are stored; None = where they are computed.
        snapshot: the tensors and the count that `go_back` returns to, or None.
        shared: tensors by name that another cache holds too: they are not overwritten.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.num_tokens: int | torch.Tensor = 0
        self.kept_dtype: torch.dtype | str | None = None
        self.kept_device: torch.device | None = None
        self.snapshot: tuple[dict[str, torch.Tensor], int | torch.Tensor] | None = None
        self.shared: dict[str, torch.Tensor] = {}

    def __setstate__(self, state: dict) -> None:
        """Also of an earlier version, which shared nothing."""
        vars(self).update({"shared": {}} | state)

    # ------------------------------------------------------------------------------------------------------- reading
    def group(self, prefix: str) -> tuple[torch.Tensor, ...]:
        """The tensors `prefix.0`, `prefix.1`, ..."""
        found: list[torch.Tensor] = []
        while (name := f"{prefix}.{len(found)}") in self.tensors:
            found.append(self.tensors[name])
        return tuple(found)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, on whatever device."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def kept(self) -> "Kept":
        """The states of finished segments, for reading."""
        return Kept(self)

    # ------------------------------------------------------------------------------------------------------- writing
    def _encode(self, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """How a tensor is stored: more than one only for quantised states."""
        if not name.startswith("kept."):
            return {name: value}
        device = self.kept_device or value.device
        if self.kept_dtype not in LARGEST:
            return {name: value.to(device, self.kept_dtype or value.dtype)}
        largest = LARGEST[self.kept_dtype]
        scale = (value.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(value.dtype).tiny)
        coded = (value / scale).round().to(torch.int8)
        coded = pack(coded) if self.kept_dtype == INT4 else coded
        return {name: coded.to(device), name.replace("kept.", "scale."): scale.to(device)}

    def _set(self, name: str, value: torch.Tensor) -> None:
        self.tensors[name] = value
        self.shared.pop(name, None)

    def put(self, name: str, value: torch.Tensor) -> None:
        """Set a tensor `[B, ...]`."""
        for part, coded in self._encode(name, value).items():
            self._set(part, coded)

    def store(
        self, name: str, value: torch.Tensor, slot: torch.Tensor, keep: torch.Tensor, backend: str = "torch"
    ) -> None:
        """Write `value` `[B, L, ...]` into slots `slot` `[B, L]` of tensor `name` where `keep` `[B, L]` is set; see
        `kernels.step.slot`. Quantised states are coded by torch."""
        coded = self.kept_dtype in LARGEST and name.startswith("kept.")
        for part, new in (self._encode(name, value) if coded else {name: value}).items():
            old = self.tensors[part]
            overwrite = self._in_place(part, old, new)
            written = slot_write(old, new, slot, keep, overwrite, "torch" if coded else backend)
            if written is not old:
                self.shared.pop(part, None)
            self.tensors[part] = written

    def _in_place(self, name: str, old: torch.Tensor, new: torch.Tensor) -> bool:
        """Whether `old` may be overwritten: no gradient needs it (that of a query needs states that have none), and
        neither the snapshot nor another cache shares it."""
        shared = self.snapshot is not None and self.snapshot[0].get(name) is old or self.shared.get(name) is old
        return not (torch.is_grad_enabled() or new.requires_grad or old.requires_grad or shared)

    def extend(self, prefixes: tuple[str, ...], size: int, copy_last: bool = False) -> None:
        """Lengthen dimension 1 of the tensors of these names to `size`, with zeros (as they are coded) or copies of
        the last entry."""
        for name, stack in self.tensors.items():
            missing = size - stack.shape[1] if name.startswith(prefixes) else 0
            if missing > 0:
                more = stack[:, -1:].expand(-1, missing, *stack.shape[2:])
                if not copy_last:
                    zero = torch.finfo(stack.dtype).tiny if name.startswith("scale.") else 0
                    more = torch.full_like(more, ZEROS if stack.dtype == torch.uint8 else zero)
                self.tensors[name] = torch.cat([stack, more], 1)
                self.shared.pop(name, None)

    def cut(self, prefixes: tuple[str, ...], size: int) -> None:
        """Shorten dimension 1 of the tensors of these names to `size`, where it is longer."""
        for name, stack in self.tensors.items():
            if name.startswith(prefixes) and stack.shape[1] > size:
                self.tensors[name] = stack[:, :size].contiguous()

    def restart(self, rows: torch.Tensor, start: dict[str, torch.Tensor]) -> None:
        """Put `start` `[1, ...]` in the place of the rows `rows` `[B]` bool: its first of dimension 1 for all of it,
        and zeros for tensors that it lacks. Nothing is overwritten."""
        for name, tensor in self.tensors.items():
            new = start.get(name, tensor.new_zeros(1, *tensor.shape[1:]))
            new = new[:, :1] if new.dim() > 1 else new
            self._set(name, torch.where(rows.to(tensor.device)[(..., *[None] * (tensor.dim() - 1))], new, tensor))
            self.shared.pop(name, None)

    def count(self, num_tokens: int) -> None:
        """`num_tokens` more were read."""
        self.num_tokens += num_tokens

    def settle(self, device: torch.device) -> None:
        """Called once, before the first forward ends: what is held from then on stays on `device`."""

    # -------------------------------------------------------------------------------------------------- all at once
    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put `function(tensor)` in the place of every tensor."""
        self.tensors = {name: function(tensor) for name, tensor in self.tensors.items()}
        self.shared = {name: tensor for name, tensor in self.shared.items() if self.tensors[name] is tensor}
        if self.snapshot is not None:
            tensors, num_tokens = self.snapshot
            self.snapshot = {name: function(tensor) for name, tensor in tensors.items()}, num_tokens

    def thaw(self) -> None:
        """Outside of inference mode, tensors that were made in it can be neither overwritten nor kept for a gradient:
        copy them, once."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if any(tensor.is_inference() for tensor in self.tensors.values()):
            self.map(torch.clone)

    def clear(self) -> None:
        """Forget everything."""
        self.tensors, self.num_tokens, self.snapshot, self.shared = {}, 0, None, {}

    # ------------------------------------------------------------------------------------------------- going back
    def take_snapshot(self) -> None:
        """What is held now is what `go_back` returns to; until then it is not overwritten."""
        self.snapshot = dict(self.tensors), self.num_tokens

    def go_back(self) -> None:
        """Hold what was held at `take_snapshot`, and drop the snapshot."""
        (self.tensors, self.num_tokens), self.snapshot = self.snapshot, None


class FixedStorage(Storage):
    """The same with tensors whose shape and address never change, the count among them."""

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens = torch.zeros((), dtype=torch.int64)

    @staticmethod
    def _fixed(tensor: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(tensor)
        return tensor

    def _set(self, name: str, value: torch.Tensor) -> None:
        old = self.tensors.get(name)
        if old is None or old.shape != value.shape:
            self.tensors[name] = self._fixed(value.clone(memory_format=torch.contiguous_format))
        else:
            old.copy_(value)

    def _in_place(self, name: str, old: torch.Tensor, new: torch.Tensor) -> bool:
        return True

    def count(self, num_tokens: int) -> None:
        self.num_tokens.add_(num_tokens)

    def settle(self, device: torch.device) -> None:
        self.num_tokens = self._fixed(self.num_tokens.to(device))

    def thaw(self) -> None:
        super().thaw()
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if self.num_tokens.is_inference():
            self.num_tokens = self._fixed(self.num_tokens.clone())

    def clear(self) -> None:
        """Forget everything but the tensors themselves."""
        self.thaw()
        for tensor in (*self.tensors.values(), self.num_tokens):
            tensor.zero_()
        self.snapshot = None

    def take_snapshot(self) -> None:
        self.snapshot = {name: tensor.clone() for name, tensor in self.tensors.items()}, self.num_tokens.clone()

    def go_back(self) -> None:
        tensors, num_tokens = self.snapshot
        self.clear()  # also what is younger than the snapshot
        for name, tensor in tensors.items():
            self._set(name, tensor)
        self.num_tokens.copy_(num_tokens)


class Kept:
    """Finished segments' states as they are stored, decoded and moved to the device that reads them.

    Attributes:
        num_slots: S. in_pool: they do not lie side by side, and `stored` is no tensor of rows and slots.
    """

    in_pool = False

    def __init__(self, storage: Storage) -> None:
        self.storage, self.like = storage, storage.tensors["state.0"]
        self.num = len(storage.group("kept"))
        self.num_slots = storage.tensors["kept.0"].shape[1]

    def stored(self, number: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tensor `number` of all states `[B, S, H, ...]` as it is stored, and the scale of quantised ones."""
        return self.storage.tensors[f"kept.{number}"], self.storage.tensors.get(f"scale.{number}")

    def all(self) -> State:
        """`[B, S, H, ...]`."""
        return tuple(fetch(*self.stored(i), None, self.like) for i in range(self.num))

    def pieces(self) -> Iterable[tuple[slice, State]]:
        """The same by ranges of slots, for who needs one after the other only."""
        return [(slice(None), self.all())]

    def chosen(self, index: torch.Tensor) -> State:
        """`[B, k, H, ...]` for slots `[B, H, k]`: only these are fetched and decoded."""
        return tuple(fetch(*self.stored(i), index, self.like) for i in range(self.num))
