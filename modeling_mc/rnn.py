# Copyright 2026 the mc-transformers authors.
"""`wrap_rnn`: an LSTM or GRU of torch, trained or not, gets the cached read."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache

from ..configuration_mc import MCConfig
from ..kernels.write.recurrent import recurrence
from .cache import MCCache
from .cache_layer import MCCacheLayer
from .layer import CachedLayer, config_of_layer
from .memories import Bias, State
from .memories.vector import VectorMemory, last_output
from .mixer import Mixer, Projected
from .segments import SegmentTable


RNNState = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
KINDS = {nn.LSTM: "lstm", nn.GRU: "gru"}
FIELDS = (
    "segmentation",
    "state_init",
    "online_memory",
    "num_selected_segments",
    "summaries_per_segment",
    "max_cached_segments",
    "cache_eviction",
    "initializer_range",
    "mc_backend",
)


class Cells(nn.Module):
    """The parameters of an RNN, not copied, under their names: `torch.compile` refuses what holds an RNN."""

    def __init__(self, rnn: nn.LSTM | nn.GRU) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_layers = rnn.input_size, rnn.hidden_size, rnn.num_layers
        self.batch_first, self.dropout, self.has_cell = rnn.batch_first, rnn.dropout, rnn.mode == "LSTM"
        for name, parameter in rnn.named_parameters():
            self.register_parameter(name, parameter)

    def weights(self, layer: int) -> tuple[torch.Tensor, ...]:
        """As `kernels.write.recurrent.recurrence` takes them; biases that the RNN does not have are zero."""
        found = [getattr(self, f"weight_{name}_l{layer}") for name in ("ih", "hh")]
        none = found[1].new_zeros(len(found[1]))
        return *found, *(getattr(self, f"bias_{name}_l{layer}", none) for name in ("ih", "hh"))


class RNNMemory(VectorMemory):
    """All layers of an RNN as one memory, of which the last layer's output h is read and cached.

    State: the last layer's h `[num, H, d]`, the other layers' h `[num, layers - 1, H * d]` if there are any, and the
    cells c of an LSTM, `[num, layers, H * d]`.
    """

    def init_weights(self) -> None:
        if self.own_gates:
            self.read_gate.init_weights()

    def initial_state(self, num: int, device: torch.device, dtype: torch.dtype = torch.float32) -> State:
        hidden = torch.zeros(num, self.cell.num_layers, self.cell.hidden_size, device=device, dtype=dtype)
        return self.pack(hidden, torch.zeros_like(hidden))

    def pack(self, hidden: torch.Tensor, cells: torch.Tensor | None) -> State:
        """The state of h and c `[num, layers, H * d]`; c only counts for an LSTM."""
        lower = (hidden[:, :-1],) if self.cell.num_layers > 1 else ()
        return (hidden[:, -1].unflatten(-1, (self.num_heads, -1)), *lower, *((cells,) if self.cell.has_cell else ()))

    def unpack(self, state: State) -> tuple[torch.Tensor, torch.Tensor | None]:
        """h and c of a state; c is None for a GRU."""
        hidden = state[0].flatten(1)[:, None]
        if self.cell.num_layers > 1:
            hidden = torch.cat([state[1], hidden], 1)
        return hidden, state[-1] if self.cell.has_cell else None

    @staticmethod
    def _inputs(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return k.flatten(-2)

    def _run(self, x: torch.Tensor, valid: torch.Tensor | None, state: State) -> tuple[torch.Tensor, State]:
        (hidden, cells), ends, last = self.unpack(state), [], []
        empty = None if valid is None or cells is None else ~valid
        for layer in range(self.cell.num_layers):
            before = hidden[:, layer], None if cells is None else cells[:, layer]
            x, cell = recurrence(x, self.cell.weights(layer), *before, empty)
            ends.append(last_output(x, valid, before[0]))
            last.append(cell)
            if layer < self.cell.num_layers - 1:
                x = F.dropout(x, self.cell.dropout, self.training)
        ends = self.pack(torch.stack(ends, 1), None if cells is None else torch.stack(last, 1))
        return x.unflatten(-1, (self.num_heads, -1)), ends


class RNNMixer(Mixer):
    """A mixer that neither projects nor gates: the RNN does all of it."""

    def __init__(self, config: MCConfig, layer_idx: int, rnn: nn.LSTM | nn.GRU) -> None:
        super().__init__(config, layer_idx, RNNMemory(config, Cells(rnn)))
        self.summary_dim = rnn.input_size  # segments are chosen by the mean of their inputs
        self.cache_signature |= {"input_size": rnn.input_size, "layers_of_rnn": rnn.num_layers}
        if config.cached_answers == "added":
            self.cached_scale = Bias((self.num_heads,), partial(init.constant_, val=config.cached_answers_start))

    def _project(self, x: torch.Tensor, table: SegmentTable, layer: MCCacheLayer | None) -> Projected:
        k = x[:, :, None]
        every = k.expand(-1, -1, self.num_heads, -1) if self.aggregation.uses_gates else None
        return Projected(k.detach(), k, k, every, every, {})


class CachedRNN(CachedLayer):
    """An RNN of torch with a cached read of its output; made by `wrap_rnn`, which see.

    Attributes:
        config: the `MCConfig` of the read.
    """

    def __init__(self, rnn: nn.LSTM | nn.GRU, config: MCConfig, layer_idx: int) -> None:
        super().__init__(config, RNNMixer(config, layer_idx, rnn))
        self.reset_parameters()
        self.mixer.to(rnn.weight_ih_l0.device, rnn.weight_ih_l0.dtype)

    @property
    def cells(self) -> Cells:
        """The parameters of the RNN and its sizes; `rnn.load_state_dict(wrapped.cells.state_dict())` unwraps it."""
        return self.mixer.memory.cell

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights of the read anew; those of the RNN stay."""
        for module in self.mixer.modules():
            if hasattr(module, "init_weights"):
                module.init_weights()

    def forward(
        self,
        x: torch.Tensor,
        hx: RNNState | None = None,
        attention_mask: torch.Tensor | None = None,
        cu_seq_lens: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, RNNState | None]:
        """As the RNN is called, and with what the cached read needs.

        Args:
            x: `[T, B, input_size]`, or `[B, T, input_size]` with `batch_first`; B, T >= 1.
            hx: the state before the first token, h (GRU) or (h, c) (LSTM), `[num_layers, B, hidden_size]`; None =
                zeros. Not with a cache that has read something, which holds the state.
            attention_mask: `[B, T]`, or with the tokens in the cache `[B, read + T]`, of any dtype: 0 = padding,
                anywhere, which the RNN does not see.
            cu_seq_lens: `[documents + 1]` integers from 0 to T, borders of documents packed into one row (B = 1, no
                padding, no cache, no `hx`).
            cache: of `make_cache`: what was read before. It is changed in place. None = a text begins.

        Returns:
            the answers, laid out as x with `hidden_size` (zero at padding), and the RNN's state after the last token,
            laid out as `hx`, without what was read from the cache; None for packed documents and in
            `context_parallel`.

        Raises:
            ValueError: inputs of another shape, `hx` beside a cache that has read something, or a cache that was
                filled by another model or batch.
        """
        if isinstance(x, nn.utils.rnn.PackedSequence):
            raise ValueError("`x` is a PackedSequence, allowed: a tensor, with `attention_mask` or `cu_seq_lens`")
        if x.ndim == 3 and not self.cells.batch_first:
            x = x.transpose(0, 1)
        table, layer = self._place(x, self.cells.input_size, attention_mask, cu_seq_lens, cache)
        if cu_seq_lens is not None or table.shards is not None:
            if hx is not None:
                raise ValueError("`hx` has no meaning with `cu_seq_lens` or in `context_parallel`: leave it out")
        else:
            cache = MCCache(config=self.config) if cache is None else cache
            layer = self.mixer.cache_layer(cache, x) if layer is None else layer
            if hx is not None:
                self._begin(layer, x, hx)
                table = self.mixer.table(x, table.mask, layer)
        out = self.mixer.answers(x, table, cache)[1].flatten(-2)
        out = table.expand(out)
        return out if self.cells.batch_first else out.transpose(0, 1), self._state(layer, x.dtype)

    def _begin(self, layer: MCCacheLayer, x: torch.Tensor, hx: RNNState) -> None:
        """Lets an empty cache begin with a state of the RNN."""
        if layer.is_initialized:
            raise ValueError("`hx` is given and `cache` has read something, which holds the state: leave one out")
        shape = (self.cells.num_layers, len(x), self.cells.hidden_size)
        states = hx if isinstance(hx, tuple | list) else (hx,)
        found = [tuple(s.shape) for s in states]
        if found != [shape] * (2 if self.cells.has_cell else 1):
            raise ValueError(f"`hx` must be {'(h, c)' if self.cells.has_cell else 'h'} of shape {shape}, got {found}")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.mixer.begin(layer, len(x), x.device, dtype)
        states = [s.to(dtype).transpose(0, 1) for s in states]
        for i, part in enumerate(self.mixer.memory.pack(states[0], states[-1])):
            levels = layer.tensors[f"state.{i}"].shape[1]
            layer.storage.put(f"state.{i}", part[:, None].expand(-1, levels, *part.shape[1:]))
        layer.lazy_initialization(x)

    def _state(self, layer: MCCacheLayer | None, dtype: torch.dtype) -> RNNState | None:
        if layer is None:
            return None
        hidden, cells = self.mixer.memory.unpack(tuple(part[:, 0] for part in layer.storage.group("state")))
        hidden = hidden.transpose(0, 1).to(dtype).contiguous()
        return hidden if cells is None else (hidden, cells.transpose(0, 1).to(dtype).contiguous())


def wrap_rnn(
    rnn: nn.LSTM | nn.GRU,
    *,
    aggregation: str = "grm",
    segment_size: int = 256,
    heads: int = 1,
    start: float = 0.0,
    layer_idx: int = 0,
    **fields,
) -> CachedRNN:
    """Give an LSTM or GRU of torch, trained or new, the cached read: its output at the end of every segment is kept,
    and later tokens read it again.

        y_t = h_t + f * sum_i sigmoid(A h_t + B h_i + b) * h_i          "grm"; "ssc": of the k segments most alike
        y_t = h_t + f * sum_i h_i                                       "residual"
        y_t = (h_t + sum_i h_i) / (1 + number of segments)              "mean": no new weights, needs no training
        y_t = h_t                                                       "none", and everywhere in the first segment

    h_t is the output of the RNN's last layer, h_i the one at the end of segment i, f a learned number per head that
    starts at zero: a trained RNN begins as itself and learns to read back. A, B and b are learned, per head.

    Args:
        rnn: `nn.LSTM` or `nn.GRU`, any number of layers, `batch_first` or not, with or without biases, dropout between
            layers included. It is not copied: its parameters are trained on.
        aggregation: "grm", "ssc", "residual", "mean" or "none".
        segment_size: tokens per segment.
        heads: parts of h that have A, B, b and f of their own.
        start: of f.
        layer_idx: number among the layers that share a cache, see `make_cache`.
        fields: of `MCConfig`: `segmentation`, `state_init` (here "checkpoint" by default: the RNN runs on over
            borders, h_t is what it always was; "independent": it begins anew in every segment), `online_memory`,
            `num_selected_segments`, `summaries_per_segment`, `max_cached_segments`, `cache_eviction`,
            `initializer_range`, `mc_backend`.

    Returns:
        a module that is called as the RNN is: `out, state = wrapped(x)`.

    Raises:
        ValueError: no LSTM or GRU, a bidirectional one or one with `proj_size`; a field or value that is not allowed.

    Example:
        >>> lstm = torch.nn.LSTM(8, 16, num_layers=2, batch_first=True)
        >>> wrapped, x = wrap_rnn(lstm, segment_size=10), torch.randn(3, 50, 8)
        >>> torch.allclose(wrapped(x)[0], lstm(x)[0], atol=1e-6)  # until f is trained
        True
    """
    if type(rnn) not in KINDS:
        raise ValueError(f"wrap_rnn: `rnn` must be a torch.nn.LSTM or torch.nn.GRU, got {type(rnn).__name__}")
    if rnn.bidirectional:
        raise ValueError("wrap_rnn: `rnn` is bidirectional, allowed: one direction (a cache holds the past only)")
    if rnn.proj_size:
        raise ValueError(f"wrap_rnn: `rnn` has proj_size={rnn.proj_size}, allowed: 0")
    if aggregation == "soup":
        raise ValueError("wrap_rnn: `aggregation`='soup' of vectors is 'grm': take that")
    added = aggregation in ("grm", "ssc", "residual")
    config = config_of_layer(
        "wrap_rnn",
        FIELDS,
        {"state_init": "checkpoint"} | fields,
        hidden_size=rnn.hidden_size,
        num_attention_heads=heads,
        num_hidden_layers=layer_idx + 1,
        memory=KINDS[type(rnn)],
        vector_read="add",
        aggregation=aggregation,
        segment_size=segment_size,
        cached_answers="added" if added else "mixed",
        cached_answers_start=start if added else 0.0,
    )
    return CachedRNN(rnn, config, layer_idx)
