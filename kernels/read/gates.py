"""The gates that weigh memories (eq. 9, 10): logits, the top-k choice (eq. 16), and the functions that turn logits
into gates. Every op and read rule takes them from here; gates_triton.py is the same in Triton.

To add a gate function, write its value and its pull-back and give it a name in `GATE_FUNCTIONS`: the config, all torch
ops and decoding know it then, and asking for Triton is an error that says that its kernels do not.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F


HIDDEN = float("-inf")  # logit of a memory that may not be read


class GateFunction(NamedTuple):
    """From logits to gates `[..., S + 1]`: S past memories, and the online one in the last place.

    Attributes:
        value: the gates of logits; 0 where a logit is HIDDEN. The online logit is finite. Autograd looks through it.
        pull_back: the gradient of the logits, from logits, gates and the gradient of the gates; 0 where HIDDEN.
        triton: whether the kernels of gates_triton.py know the function, by its name.
    """

    value: Callable[[torch.Tensor], torch.Tensor]
    pull_back: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    triton: bool = False


def _softmax_pull_back(logits: torch.Tensor, gates: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return gates * (grad - (gates * grad).sum(-1, keepdim=True))


def _relu_sum(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the positive parts, and 1 where there is none, else 0."""
    total = logits.relu().sum(-1, keepdim=True)
    return total, (total == 0).to(total.dtype)


def _relu(logits: torch.Tensor) -> torch.Tensor:
    total, none = _relu_sum(logits)
    return (logits.relu() + F.pad(none, (logits.shape[-1] - 1, 0))) / (total + none)  # none: the online memory alone


def _relu_pull_back(logits: torch.Tensor, gates: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return (logits > 0) * (grad - (gates * grad).sum(-1, keepdim=True)) / sum(_relu_sum(logits))


CONSTANT = "one"  # no choice of a config: the read rules "residual" and "mean" are that
GATE_FUNCTIONS: dict[str, GateFunction] = {
    # the gates of a token sum to one
    "softmax": GateFunction(lambda x: x.softmax(-1), _softmax_pull_back, triton=True),
    # each on its own
    "sigmoid": GateFunction(torch.sigmoid, lambda x, gates, grad: grad * gates * (1 - gates), triton=True),
    # positive parts, divided by their sum; the online memory answers alone where no logit is positive
    "relu": GateFunction(_relu, _relu_pull_back, triton=True),
    # 1 for every memory that may be read: of memories that weigh their answers themselves
    CONSTANT: GateFunction(lambda x: (x > HIDDEN).to(x.dtype), lambda x, gates, grad: torch.zeros_like(grad)),
}


def gate_function(name: str) -> GateFunction:
    """The entry of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in GATE_FUNCTIONS:
        raise ValueError(
            f"`function`={name!r} is not a gate function, allowed: {', '.join(map(repr, GATE_FUNCTIONS))}"
        )
    return GATE_FUNCTIONS[name]


def missing_in_triton(name: str) -> str | None:
    """Why the Triton kernels cannot take a gate function (see `choose_backend`), or None.

    Raises:
        ValueError: no gate function has that name.
    """
    if gate_function(name).triton:
        return None
    known = ", ".join(repr(other) for other, entry in GATE_FUNCTIONS.items() if entry.triton)
    return f"its kernels do not know gate function {name!r}, only {known}"


def apply_gates(logits: torch.Tensor, online_logit: torch.Tensor, function: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates of past memories `[..., S]` and of the online one `[...]`, from their logits.

    Raises:
        ValueError: no gate function has that name.
    """
    gates = gate_function(function).value(torch.cat([logits, online_logit[..., None]], -1))
    return gates[..., :-1], gates[..., -1]


# ---------------------------------------------------------------------------------------------------------- logits
def gate_logits(u: torch.Tensor, summaries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`<u_t, summary_i>` `[..., T, S]` from u `[..., T, d]` and summaries `[..., S, m, d]`; the maximum over the m
    sub-block means of a segment, and its index (None for m = 1)."""
    memories, blocks = summaries.shape[-3:-1]
    logits = u @ summaries.flatten(-3, -2).transpose(-1, -2)
    if blocks == 1:
        return logits, None
    best = logits.unflatten(-1, (memories, blocks)).max(-1)
    return best.values, best.indices


def gate_logits_backward(
    grad: torch.Tensor, choice: torch.Tensor | None, u: torch.Tensor, summaries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of u and summaries from that of the logits, and the index that `gate_logits` gave."""
    if choice is not None:
        spread = grad.new_zeros(*grad.shape, summaries.shape[-2])
        grad = spread.scatter_(-1, choice[..., None], grad[..., None]).flatten(-2)
    return grad @ summaries.flatten(-3, -2), (grad.transpose(-1, -2) @ u).view_as(summaries)


def first_readable(first: torch.Tensor) -> list[int]:
    """Per query segment the first memory that any row may read, from `first` `[R, N]` of `segment_read`: a bounded
    cache and packed documents then cost what they may read, and not all that is there. 0 where knowing it would stall
    a GPU, and where an exporter traces."""
    known = first.device.type == "cpu" and not torch.compiler.is_compiling()
    return first.amin(0).tolist() if known else [0] * first.shape[1]


def hidden_memories(birth: torch.Tensor, first: torch.Tensor, segments: slice, memories: slice) -> torch.Tensor:
    """`[R, N, V]` bool: which of these V memories the query segments may not read; see `segment_read`."""
    rank = torch.arange(segments.start, segments.stop, device=birth.device)
    slot = torch.arange(memories.start, memories.stop, device=birth.device)
    return (birth[:, None, memories] > rank[:, None]) | (slot < first[:, segments, None])


def last_readers(birth: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """`[R, S]` int64: memory i is read by query segments below it. `first` rises along a row."""
    slots = torch.arange(birth.shape[1], device=birth.device).expand(len(birth), -1).contiguous()
    return torch.searchsorted(first, slots, right=True).masked_fill(birth >= first.shape[1], 0)


def kept_memories(birth: torch.Tensor, num: int) -> torch.Tensor:
    """`[R]` int64: the memories kept from earlier up to the last that may be read: a static cache has more."""
    cached = birth.shape[1] - num
    if not cached:
        return birth.new_zeros(len(birth))
    return ((birth[:, :cached] < num) * torch.arange(1, cached + 1, device=birth.device)).amax(1)


# ---------------------------------------------------------------------------------------------------- top-k choice
def largest(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logits (eq. 16) `[..., top_k]`, and whose they are, int64; HIDDEN and -1 where fewer may be read."""
    best, missing = logits.topk(min(top_k, logits.shape[-1]), dim=-1), (0, max(0, top_k - logits.shape[-1]))
    values, index = best.values, best.indices.masked_fill(best.values == HIDDEN, -1)
    if missing[1]:
        values, index = F.pad(values, missing, value=HIDDEN), F.pad(index, missing, value=-1)
    return values, index


def choose_best(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """The memories with the largest logits alone, `[..., top_k]` int64; -1 where fewer may be read."""
    return largest(logits, top_k)[1]


def logits_of_chosen(u: torch.Tensor, summaries: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Logits `[R, N, W, H, k]` of chosen memories alone, HIDDEN where the index is -1.

    Args:
        u: `[R, N, W, H, d]`. summaries: `[R, S, H, m, d]`. index: `[R, N, W, H, k]` into the S memories, or -1.
    """
    row = torch.arange(index.shape[0], device=index.device).view(-1, 1, 1, 1, 1)
    head = torch.arange(index.shape[3], device=index.device)[:, None]
    chosen = summaries[row, index.clamp(min=0), head]  # [R, N, W, H, k, m, d]
    # products and sums: as matrix products the many tiny matrices would be slow
    logits = (chosen * u.to(chosen.dtype)[..., None, None, :]).sum(-1).amax(-1)
    return logits.masked_fill(index < 0, HIDDEN)


# ---------------------------------------------------------------------------------------------- gates of all memories
def grid_gates(
    u: torch.Tensor,
    summaries: torch.Tensor,
    online_logit: torch.Tensor,
    birth: torch.Tensor,
    first: torch.Tensor,
    function: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates of past memories `[R, N, W, H, S]` and of the online one `[R, N, W, H]` of a segment grid, all at once.

    Args: as in `segment_read`.

    Raises:
        ValueError: no gate function has that name.
    """
    num, width = u.shape[1:3]
    logits, _ = gate_logits(u.to(summaries.dtype).movedim(3, 1).flatten(2, 3), summaries.transpose(1, 2))
    logits = logits.unflatten(2, (num, width)).movedim(1, 3)
    hidden = hidden_memories(birth, first, slice(0, num), slice(0, birth.shape[1]))[:, :, None, None]
    return apply_gates(logits.masked_fill(hidden, HIDDEN), online_logit, function)


def content_gates(
    u: torch.Tensor,
    online_logit: torch.Tensor,
    summaries: torch.Tensor,
    visible: torch.Tensor,
    index: torch.Tensor | None,
    top_k: int,
    function: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gates of T tokens per row that may read the same memories.

    Args:
        u: `[B, T, H, d]`. online_logit: `[B, T, H]`. summaries: `[B, S, H, m, d]`. visible: `[B, S]` bool.
        top_k: 0 = read all, else the number of best ones. index: `[B, T, H, K]` int64, what to read instead, or -1;
            with top_k. function: a name of `GATE_FUNCTIONS`.

    Returns:
        gates of past memories `[B, T, H, K]`, of the online one `[B, T, H]`, and which memories the first belong to,
        `[B, T, H, K]` int64 or -1; None: all S.

    Raises:
        ValueError: no gate function has that name.
    """
    logits, _ = gate_logits(u.to(summaries.dtype).transpose(1, 2), summaries.transpose(1, 2))
    logits = logits.transpose(1, 2).masked_fill(~visible[:, None, None], HIDDEN)
    if not top_k:
        return *apply_gates(logits, online_logit, function), None
    if index is None:
        logits, index = largest(logits, top_k)
    else:
        logits = logits.gather(-1, index.clamp(min=0)).masked_fill(index < 0, HIDDEN)
    return *apply_gates(logits, online_logit, function), index


def token_gates(
    u: torch.Tensor,
    online_logit: torch.Tensor,
    summaries: torch.Tensor,
    visible: torch.Tensor,
    index: torch.Tensor | None,
    top_k: int,
    function: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`content_gates` of one token per row: u `[B, H, d]`, online_logit `[B, H]`, index and results without T."""
    index = None if index is None else index[:, None]
    gates, online_gate, index = content_gates(
        u[:, None], online_logit[:, None], summaries, visible, index, top_k, function
    )
    return gates[:, 0], online_gate[:, 0], None if index is None else index[:, 0]
