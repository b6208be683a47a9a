# Copyright 2026 the mc-transformers authors.
"""A kind of checkpoint that can be converted: its config, a table of names, and how tensors are cut."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch


# one source tensor, the config of the source, and the tensors for the rule's targets
Split = Callable[[torch.Tensor, dict], Sequence[torch.Tensor]]


def keep(tensor: torch.Tensor, found: dict) -> Sequence[torch.Tensor]:
    """The `Split` that leaves a tensor as it is."""
    return (tensor,)


def _same(found: dict) -> dict:
    return found


@dataclass(frozen=True)
class Source:
    """A kind of checkpoint that can be converted.

    Attributes:
        name: for `--from`. model_types: what its config.json says.
        make_config: config.json as a dictionary to the fields of an MCConfig; raises ValueError for what is missing.
        rules: (pattern of a whole name, target names with groups, split), the first that matches counts; the names
            may be a function of the match and the source's config; none = the weight is not needed.
        zeros: ends of the names of weights that the source does not have, because they are zero there.
        merges: (pattern with one group `part`, its values in order): such weights are joined along their rows to one
            whose name lacks the part, and only then looked up in the rules.
        fresh: what is missing in a mixer starts as in a new model.
        names: patterns of names that Transformers knows under others, for `verify_logits`.
        aliases: other names for `--from`.
        translate: config.json of another layout of this kind to that of Transformers; every other config as it is.
        with_memory_layers: numbers of attention layers to the source that makes memory layers of them; None = it has
            none to choose from.
    """

    name: str
    model_types: tuple[str, ...]
    make_config: Callable[[dict], dict]
    rules: tuple[tuple[str, tuple[str, ...] | Callable[[re.Match, dict], list[str]], Split], ...]
    zeros: tuple[str, ...] = ()
    merges: tuple[tuple[str, tuple[str, ...]], ...] = ()
    fresh: bool = False
    names: dict[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    translate: Callable[[dict], dict] = _same
    with_memory_layers: "Callable[[Sequence[int]], Source] | None" = None

    def targets(self, name: str, found: dict) -> tuple[list[str], Split]:
        """Target names of a source tensor.

        Raises:
            ValueError: no rule knows it.
        """
        for pattern, targets, split in self.rules:
            if match := re.fullmatch(pattern, name):
                names = targets(match, found) if callable(targets) else map(match.expand, targets)
                return list(names), split
        raise ValueError(
            f"no rule of --from {self.name} knows the weight {name!r}: this is another kind of checkpoint, or has a "
            "head that language models do not have"
        )

    def merged(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """`weights` with what belongs together joined.

        Raises:
            ValueError: a part is missing.
        """
        waiting: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in weights:
            for pattern, order in self.merges:
                if match := re.fullmatch(pattern, name):
                    start, stop = match.span("part")
                    whole = name[:start] + name[stop:]
                    parts = waiting.setdefault(whole, {})
                    parts[match["part"]] = tensor
                    if len(parts) == len(order):
                        yield whole, torch.cat([waiting[whole][part] for part in order])
                        del waiting[whole]
                    break
            else:
                yield name, tensor
        if waiting:
            name = min(waiting)
            raise ValueError(f"the checkpoint lacks parts of {name!r}: it has {', '.join(waiting[name])}")


def refuse(piece: str, value: object, allowed: str) -> None:
    """Refuse something of a checkpoint that this family does not have.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"this checkpoint has {piece} ({value!r}), which this family does not have; supported: {allowed}")
