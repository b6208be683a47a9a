# Copyright 2026 the mc-transformers authors.
"""The protocol of a base memory: how a token is written (eq. 4) and how a memory answers a query.

To add a memory, write one file with a subclass and register it by one line in `memories/__init__.py`: of
`memories.plain.PlainMemory`, which needs no more than a rule for one token, or of `Memory`, which is fast.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ...kernels.shared.ops import compute_dtype
from ..segments import SegmentTable
from ..tensor_parallel import HeadShare
from .reads import Reads, State, mix_answers


@dataclass
class Trace:
    """What writing a segment grid leaves behind.

    Attributes:
        online: `[R, N, W, H, dv]`, M_t(q_t), the answer of the memory that holds the tokens up to and with t.
        ends: the full state after every grid segment, tensors `[R, N, H, ...]`.
        segment_ends: those of the segments' own memories, where the online one never starts anew (`write_running`).
    """

    online: torch.Tensor
    ends: State
    segment_ends: State | None = field(default=None, init=False)

    def read_map(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The online memory's linear map number `index` alone, on one input per slot `[R, N, W, H, *]`."""
        raise NotImplementedError


class Bias(nn.Module):
    """A learned constant that stays in fp32 in a half-precision model, whether it is loaded or cast (`.half()`,
    `.to(torch.bfloat16)`): a gate's bias, a decay rate, M_0.

    A module of its own, so that FSDP2 can shard it apart from parameters of another dtype and gather it when it is
    called; and its parameter is a `bias`, which Transformers' Trainer leaves out of weight decay.

    Args:
        start: fills the parameter with its initial value, in place.

    Its first dimension is the heads. `share`: which of them this rank has (tensor parallel); None = all.
    """

    share: HeadShare | None = None

    def __init__(self, shape: tuple[int, ...], start: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.start = start
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.bias = nn.Parameter(torch.empty(shape, dtype=dtype))

    def init_weights(self) -> None:
        self.start(self.bias)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args, **kwargs) -> "Bias":
        """What torch calls to move and cast the parameter and its gradient."""

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            return tensor.to(new.device, torch.float32) if new.itemsize < 4 else new

        return super()._apply(apply, *args, **kwargs)

    def forward(self, dtype: torch.dtype) -> torch.Tensor:
        bias = self.bias if self.share is None else self.share.part(self.bias)
        return bias.to(dtype, copy=True)  # the parameter itself may be freed after the call


class Memory(Reads):
    """A write rule. Its state is a tuple of tensors `[num, H, ...]` in fp32 (float64 for float64 inputs).

    A subclass **must** have `initial_state`, `step` and `read`: the rule token by token, which is decoding and the
    specification of everything else; and `gates` if its rule has any. With `memories.plain.PlainMemory` as its base
    class that is all. A subclass that is fast also has

        write           a whole segment grid at once
        gated_read      the read of `grm`, and of `soup` if `num_maps` is 1
        selected_read   the read of `ssc`
        constant_read   the read of `residual` and `mean`

    It **may** have: `gate_shape` (gates per channel); `gate_names_for` (gates that depend on the config);
    `check` (what the config may not say); `init_weights`; `align`; `read_cached`, with `own_gates`;
    `token_read` and `token_soup` (a faster read of one token); for `soup`, `between` and `finish` (`num_maps` > 1) or
    `soup_read` (0).

    Its **flags** are class attributes:
        gate_names: which of the mixer's gate projections the rule takes: "a" decay, "b" momentum or second write
            strength, "e" step size or write strength.
        gate_bias: start value of each gate's bias.
        num_read: how many leading tensors of the state are needed to read it; only these are cached per segment.
        num_maps: linear maps that a read applies one after the other, each held by one of the leading tensors as
            `[..., d_in, d_out]`. 1: answers are linear in the state, so that Memory Soup is GRM. More: `between` and
            `finish` connect them. 0: the read is something else, and `soup_read` mixes states.
        own_gates: the memory weighs its cached answers itself, by the online answer: the read rule sums them, all or
            the chosen ones, and reads them with the online answer in the place of the query.
        weighs_choice: with `own_gates`, that chosen answers have the gates of the read rule besides.
        reads_query: whether an answer depends on the query; without, it is there for its shape and dtype only.
        has_triton: whether every op of the memory has a Triton kernel.
        mixes_heads: whether what is written into one head's memory depends on other heads.
        shared_by_heads: for tensor parallel, names of modules with parameters that all heads share. What belongs to
            heads is in a `Bias` or another module that knows a `share`.
        own_fields: fields of the config that only this memory, and others that name them too, may change.
    """

    gate_names: tuple[str, ...] = ()
    gate_bias: dict[str, float] = {}
    num_read = 1
    num_maps = 1
    own_gates = False
    weighs_choice = False
    reads_query = True
    has_triton = False
    mixes_heads = False
    shared_by_heads: tuple[str, ...] = ()
    own_fields: tuple[str, ...] = ()

    def __init__(self, config) -> None:
        super().__init__()
        self.config, self.chosen = config, "auto"
        self.gate_names = self.gate_names_for(config)
        self.num_heads = config.memory_heads
        self.key_dim = config.memory_key_dim
        self.value_dim = config.memory_value_dim

    @property
    def backend(self) -> str:
        """What its ops are asked for: `mc_backend`, or what "auto" was last found to be (`qualify.py`)."""
        return self.chosen if self.config.mc_backend == "auto" else self.config.mc_backend

    @classmethod
    def check(cls, config) -> None:
        """Refuse (`MCConfig.refuse`) the values of a config that this memory cannot have.

        Raises:
            ValueError: there is one.
        """

    def gate_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one token's gate `name`: `(H,)`, or `(H, d)` for one per channel."""
        return (self.num_heads,)

    @classmethod
    def gate_names_for(cls, config) -> tuple[str, ...]:
        """`gate_names` of a memory whose gates depend on the config."""
        return cls.gate_names

    @classmethod
    def check_square(cls, config) -> None:
        """`check` of a memory whose values are as wide as its keys."""
        if config.memory_value_dim != config.memory_key_dim:
            config.refuse(
                "value_head_dim", f"head_dim={config.memory_key_dim} (or None) with memory={config.memory!r}"
            )

    @property
    def align(self) -> int:
        """Slots of the grid are aligned to a multiple of this inside a segment (inner chunk of deep memories)."""
        return 1

    def forward(self, function, *args):
        """`function(*args)` with the parameters in place: what moves weights (offloading) hooks into `forward`."""
        return function(*args)

    def init_weights(self) -> None:
        """Initialise the memory's own parameters in place; modules inside it have a method of this name too."""

    def gates(self, raw: dict[str, torch.Tensor], k: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a token brings besides key and value, by names of the memory's own choice, in fp32.

        Zero must be neutral for every value: it fills slots without a token, which may neither write nor decay.

        Args:
            raw: pre-activations `[..., *gate_shape(name)]` of the projections, in fp32. k: `[..., H, dk]`.
            x: `[..., hidden]`, the mixer's input, for gates with a projection of their own (low rank).

        Returns:
            values of any shape `[..., H]` or `[..., H, d]`.
        """
        return {}

    def initial_state(self, num: int, device: torch.device, dtype: torch.dtype = torch.float32) -> State:
        """M_0 for `num` sequences, tensors `[num, H, ...]`."""
        raise NotImplementedError

    def write(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gates: dict[str, torch.Tensor],
        table: SegmentTable,
        state: State | None,
        carry: bool,
    ) -> Trace:
        """Write a whole segment grid in parallel over tokens and, unless `carry`, over segments.

        Args:
            q, k: `[R, N, W, H, dk]`; v: `[R, N, W, H, dv]`; gates `[R, N, W, H, ...]`. Without a token, k, v and gates
                are zero.
            state: where the first grid segment of each row starts, tensors `[R, H, ...]`; None = M_0.
            carry: segments start from the last state of the one before (checkpoint), else from M_0 (independent).
        """
        raise NotImplementedError

    def step(self, state: State, k: torch.Tensor, v: torch.Tensor, gates: dict[str, torch.Tensor]) -> State:
        """The state after one more token: k `[B, H, dk]`, v `[B, H, dv]`, gates `[B, H, ...]` (eq. 4). Tensors of its
        own: `History.push` may overwrite them."""
        raise NotImplementedError

    def write_running(self, q, k, v, gates, table: SegmentTable, running: State | None, state: State | None) -> Trace:
        """Write a grid into a memory that never starts anew and, apart from it, into those of its segments.

        Args:
            running: where the first begins, tensors `[R, H, ...]`; None = M_0. state: where the segment of the first
                grid segment begins. The others: as in `write`.

        Returns:
            what the running memory leaves (its answers and its states at the segments' ends), with the `ends` of
            the segments' own memories in `Trace.segment_ends`.
        """
        trace = self.write(q, k, v, gates, table, running, True)
        trace.segment_ends = self.write(q, k, v, gates, table, state, False).ends
        return trace


__all__ = ["Bias", "Memory", "State", "Trace", "compute_dtype", "mix_answers"]
