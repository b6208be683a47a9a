# Copyright 2026 the mc-transformers authors.
"""Which part of a text did a token read? Gates by layer, with the tokens that every memory holds, and a picture."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class LayerGates:
    """What a memory layer read.

    Attributes:
        layer: its number in the model.
        gates: `[B, H, T, S + 1]`, what the answers are multiplied with; see `output_attentions` in `MCModel.forward`.
        spans: `[B, T, S + 1, 2]` int64, the tokens `ids[start:stop]` that each column's memory has been written with,
            for every token; start = stop where there is no such memory (yet), and at padding.
    """

    layer: int
    gates: torch.Tensor
    spans: torch.Tensor

    def by_token(self) -> torch.Tensor:
        """`[B, H, T, T]`: entry (t, s) is the gate under which token t read the memory that holds token s."""
        steps = torch.arange(self.gates.shape[2], device=self.gates.device)
        holds = (steps >= self.spans[..., :1]) & (steps < self.spans[..., 1:])  # [B, T, S + 1, T]
        return torch.einsum("bhtc,btcs->bhts", self.gates, holds.to(self.gates.dtype))


@torch.no_grad()
def read_gates(
    model: nn.Module, ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
) -> list[LayerGates]:
    """What every memory layer of a model reads of a text.

    Args:
        model: an `MCModel` or one with a head.
        ids: `[B, T]` tokens. attention_mask: `[B, T]`, 0 = padding; None = none.

    Returns:
        one entry per memory layer, in their order.

    Raises:
        ValueError: a model without memory layers, or with borders that content chooses.

    Example:
        >>> model = MCForCausalLM(MCConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...     segment_size=10))
        >>> (found,) = read_gates(model, torch.ones(1, 35, dtype=torch.long))
        >>> found.gates.shape, found.spans[0, -1].tolist()
        (torch.Size([1, 2, 35, 4]), [[0, 10], [10, 20], [20, 30], [30, 35]])
    """
    base = getattr(model, model.base_model_prefix, model)
    if base.config.segmentation == "content":
        raise ValueError("read_gates: `segmentation`='content' is not supported, allowed: 'constant' or 'logarithmic'")
    mixers = {i: layer.mixer for i, layer in enumerate(base.layers) if hasattr(layer, "mixer")}
    if not mixers:
        raise ValueError("read_gates: `model` has no memory layers")
    found: dict[int, torch.Tensor] = {}
    hooks = [
        mixer.read_gates.register_forward_hook(lambda module, inputs, gates, i=i: found.update({i: gates}))
        for i, mixer in mixers.items()
    ]
    try:
        base(ids, attention_mask=attention_mask, output_attentions=True, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    return [LayerGates(i, gates, _spans(base.config, mask != 0, gates.shape[-1] - 1)) for i, gates in found.items()]


def _spans(config, real: torch.Tensor, columns: int) -> torch.Tensor:
    """See `LayerGates.spans`; real `[B, T]` bool."""
    size, (rows, num_tokens) = config.segment_size, real.shape
    position = (real.cumsum(1) - 1).clamp(min=0)  # [B, T], of real tokens
    finished, column = position[..., None] // size, torch.arange(columns, device=real.device)
    if config.segmentation == "logarithmic":
        stop = (finished >> column) << column
        begin, known = stop - (1 << column), (finished >> column) & 1 == 1
    else:
        begin, stop, known = column.expand_as(finished * column), column + 1, column < finished
    endless = config.aggregation == "none" or config.online_memory == "running"
    online = torch.zeros_like(position) if endless else position // size * size
    begin, stop = begin * size, (stop * size).expand_as(known)
    first = torch.cat([begin * known, online[..., None]], -1)
    last = torch.cat([torch.where(known, stop, 1), position[..., None] + 1], -1) - 1
    # numbers of real tokens to places in the row
    place = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    row = torch.arange(rows, device=real.device)[:, None, None]
    spans = torch.stack([place[row, first.clamp(max=num_tokens - 1)], place[row, last] + 1], -1)
    there = torch.nn.functional.pad(known, (0, 1), value=True) & real[..., None]
    return spans * there[..., None]


def plot_gates(found: LayerGates, head: int | None = None, row: int = 0, tokens: list[str] | None = None):
    """A picture of `read_gates`: token t (downwards) read the memory that holds token s (to the right) under a gate
    that the colour shows. Needs matplotlib, which the extra `train` installs.

    Args:
        found: of one layer.
        head: number of a head; None = the mean over heads. row: of the batch.
        tokens: T texts, written at both axes.

    Returns:
        a `matplotlib.figure.Figure`; `figure.savefig("gates.svg")` writes it.

    Raises:
        ImportError: matplotlib is missing. ValueError: a head or row that there is not, or another number of tokens.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_gates needs matplotlib: pip install matplotlib, or the extra `train`") from error
    rows, heads, num_tokens, _ = found.gates.shape
    for name, value, size in (("head", 0 if head is None else head, heads), ("row", row, rows)):
        if not 0 <= value < size:
            raise ValueError(f"plot_gates: `{name}`={value} is not valid, allowed: 0 to {size - 1}")
    if tokens is not None and len(tokens) != num_tokens:
        raise ValueError(f"plot_gates: `tokens` has {len(tokens)} texts, allowed: {num_tokens}, one per token")
    image = found.by_token()[row].float().cpu().numpy()
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(
        image.mean(0) if head is None else image[head], cmap="magma_r", vmin=0, interpolation="nearest"
    )
    figure.colorbar(shown, label="gate")
    axes.set(xlabel="token whose memory is read", ylabel="token that reads")
    axes.set_title(f"layer {found.layer}, {'mean of heads' if head is None else f'head {head}'}", fontsize="medium")
    if tokens is not None:
        axes.set_xticks(range(num_tokens), tokens, rotation=90, fontsize=5)
        axes.set_yticks(range(num_tokens), tokens, fontsize=5)
    return figure
