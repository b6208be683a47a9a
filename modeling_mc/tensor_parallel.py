# Copyright 2026 the mc-transformers authors.
"""Tensor parallel: every rank has a part of a memory layer's heads, with their states and their cache.

Transformers splits the projections by a plan. What else a layer has per head (gate biases, decay rates, M_0, norms,
convolutions) is small: every rank holds it whole and takes its own part, and the gradient of the whole is the sum over
the ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging


logger = logging.get_logger(__name__)


class _Part(torch.autograd.Function):
    """This rank's part of a tensor that all ranks hold; its gradient is the sum of what the ranks' parts received."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, share: "HeadShare") -> torch.Tensor:
        ctx.share, ctx.shape = share, x.shape
        return share.narrow(x).clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = grad.new_zeros(ctx.shape)
        ctx.share.narrow(whole).copy_(grad)
        dist.all_reduce(whole, group=ctx.share.group)
        return whole, None


class _Whole(torch.autograd.Function):
    """A tensor that all ranks hold and use with their own heads; its gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, share: "HeadShare") -> torch.Tensor:
        ctx.share = share
        return x.clone()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.share.group)
        return grad, None


class _Every(torch.autograd.Function):
    """The parts of all ranks, one after the other along a dimension; every rank goes on with all of them alike."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, share: "HeadShare", dim: int) -> torch.Tensor:
        ctx.share, ctx.dim, ctx.length = share, dim, x.shape[dim]
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(share.size)]
        dist.all_gather(parts, x, group=share.group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.narrow(ctx.dim, ctx.share.rank * ctx.length, ctx.length), None, None


@dataclass(frozen=True)
class HeadShare:
    """Part number `rank` of `size` equal parts of all heads; the other ranks of `group` have the others."""

    group: "dist.ProcessGroup"
    rank: int
    size: int

    def __deepcopy__(self, memo: dict) -> "HeadShare":
        return self  # a process group is no data

    def narrow(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of x `[heads * n, ...]`, a view of it."""
        length = x.shape[0] // self.size
        return x.narrow(0, self.rank * length, length)

    def part(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter `[heads * n, ...]` that all ranks hold whole."""
        return _Part.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self.narrow(x)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """What all heads share, a parameter or the input of theirs."""
        return _Whole.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else x

    def every(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """x of all ranks, their heads in order along `dim`."""
        return _Every.apply(x, self, dim)


class HeadLinear(nn.Linear):
    """A linear map without a bias whose outputs `[..., H * n]` belong to heads, of an input that all heads share."""

    share: HeadShare | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.share is None:
            return super().forward(x)
        return F.linear(self.share.whole(x), self.share.part(self.weight))


def mixed_by(config, memory: type[nn.Module]) -> tuple[str, object] | None:
    """The field and value of an `MCConfig`, with the write rule `memory`, by which heads of memory layers depend on
    each other; None if they do not."""
    if memory.mixes_heads:
        return "memory", config.memory
    if config.segment_summary == "hidden":
        return "segment_summary", "hidden"
    if config.max_cached_segments is not None and config.cache_eviction == "least_read":
        return "cache_eviction", "least_read"
    return None


def why_whole(mixer: nn.Module, ranks: int) -> str | None:
    """Why the heads of an `MCMixer` cannot be dealt out to `ranks` ranks; None = they can."""
    config = mixer.config
    if (mixed := mixed_by(config, type(mixer.memory))) is not None:
        return f"{mixed[0]}={mixed[1]!r} mixes heads"
    if config.memory_heads % ranks or config.memory_key_heads % ranks:
        heads = f"{config.memory_heads} heads of memory layers ({config.memory_key_heads} of keys)"
        return f"{heads} are not divisible by {ranks}"
    for name, module in mixer.memory.named_modules():
        own = next(module.parameters(recurse=False), None)
        if own is not None and not hasattr(module, "share") and name not in mixer.memory.shared_by_heads:
            return (
                f"memory={config.memory!r} has parameters (`{name or type(module).__name__}`) not known to be by head"
            )
    return None


def plan_heads(model: nn.Module, ranks: int, override: object) -> bool:
    """Change the plan of a model of the family so that memory layers are split by heads, where that is possible; else
    say why not.

    Args:
        override: rules of the user's own, by name, or None; if they concern memory layers, the plan stays as it is.

    Returns:
        whether it was.
    """
    mixers = {name: module for name, module in model.named_modules() if hasattr(module, "memory")}
    own_rules = isinstance(override, dict) and (not override or any(".mixer." in name for name in override))
    if ranks < 2 or not mixers or own_rules:
        return False
    name, mixer = next(iter(mixers.items()))
    if (reason := why_whole(mixer, ranks)) is not None:
        logger.warning(
            f"tensor parallel: {reason}: projections are split over {ranks} ranks, and every rank writes and reads "
            "the memories of all heads"
        )
        return False
    prefix = ".".join("*" if part.isdigit() else part for part in name.split("."))
    plan = {part: "colwise" for part, module in mixer.named_children() if isinstance(module, nn.Linear)}
    plan["o_proj"] = "rowwise"
    model._tp_plan = model._tp_plan | {f"{prefix}.{part}": style for part, style in plan.items()}
    return True


def take_heads(model: nn.Module) -> None:
    """Let every mixer of a model, whose projections have been split, have this rank's heads."""
    for mixer in model.modules():
        if hasattr(mixer, "memory"):
            mesh = mixer.k_proj.weight.device_mesh
            mesh = mesh if mesh.ndim == 1 else mesh["tp"]
            mixer.take_heads(HeadShare(mesh.get_group(), mesh.get_local_rank(), mesh.size()))
