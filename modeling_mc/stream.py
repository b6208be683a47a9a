# Copyright 2026 the mc-transformers authors.
"""A text without an end, read in constant memory."""

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.generation import LogitsProcessorList

from .cache import OF_A_STREAM, MCCache
from .memory_file import reading, write


HIDDEN = OF_A_STREAM + "hidden"  # tensor of a stream's file, `[B, hidden]`
BOUNDS = ("max_cached_segments", "cache_eviction")
Tokens = torch.Tensor | list[int]


def bounded(model: nn.Module, max_cached_segments: int | None, cache_eviction: str | None) -> nn.Module:
    """`model` itself if its cache is bounded like that (None = as it is), else one with the same weights, not copied,
    and this bound.

    Raises:
        ValueError: what `MCConfig` refuses.
    """
    wanted = {"max_cached_segments": max_cached_segments, "cache_eviction": cache_eviction}
    wanted = {name: value for name, value in wanted.items() if value not in (None, getattr(model.config, name))}
    if not wanted:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    for name, value in wanted.items():
        setattr(model.config, name, value)
    model.config.check()
    for module in model.modules():
        if hasattr(module, "set_read_rule"):
            module.set_read_rule()
    return model


def _check_constant(config) -> None:
    """Refuse a model whose cache grows with the text."""
    if "full_attention" in config.layer_types:
        raise ValueError(
            "Stream: layers of full attention keep every token, allowed: sliding attention, memory layers"
        )
    grows = config.aggregation != "none" and config.segmentation != "logarithmic"
    if grows and config.max_cached_segments is None:
        raise ValueError(
            "Stream: `max_cached_segments`=None is not valid, allowed: an integer >= 1, as this model keeps every "
            "finished segment"
        )


@dataclass
class State:
    """Where a stream stands: what it has read, and the hidden state `[B, hidden]` of the last token, if any."""

    cache: MCCache
    last: torch.Tensor | None = None


class Stream:
    """Reads a text that never ends, piece by piece, and can be asked at any time. What it holds does not grow: a
    bounded cache, and the last hidden state. (With logarithmic segments: by one state whenever the text doubles.)

    Args:
        model: an `MCForCausalLM`, or an `MCModel`, which has hidden states only. It stays as it is.
        max_cached_segments: finished segments that are kept per layer; None = as the model's config says.
        cache_eviction: which one leaves, "oldest" or "least_read"; None = as the config says.
        rows: texts that are read side by side, B.
        piece: tokens that are read at a time, which bounds activations; None = 4 segments.
        kwargs: of `MCCache`: `offload_segments`, `state_dtype`.

    Attributes:
        model: with the bound, and the weights of the one that was given.

    Raises:
        ValueError: a model whose cache grows: constant segments without a bound, layers of full attention; rows or a
            piece below 1.

    Example:
        >>> config = MCConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        ...     segment_size=16)
        >>> stream = Stream(MCForCausalLM(config), max_cached_segments=4)
        >>> for _ in range(3):
        ...     stream.feed(torch.randint(64, (1000,)))
        >>> stream.num_tokens, stream.num_segments, stream.score([5, 6, 7]).shape
        (3000, 4, torch.Size([1, 3]))
        >>> stream.next_tokens(5).shape, stream.num_tokens
        (torch.Size([1, 5]), 3003)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_cached_segments: int | None = None,
        cache_eviction: str | None = None,
        rows: int = 1,
        piece: int | None = None,
        **kwargs,
    ) -> None:
        self.model = bounded(model, max_cached_segments, cache_eviction)
        _check_constant(self.model.config)
        self.rows, self.piece = rows, 4 * self.model.config.segment_size if piece is None else piece
        for name in ("rows", "piece"):
            if getattr(self, name) < 1:
                raise ValueError(f"Stream: `{name}`={getattr(self, name)} is not valid, allowed: an integer >= 1")
        self._state = State(MCCache(self.model.config, **kwargs))

    # -------------------------------------------------------------------------------------------------------- asking
    @property
    def cache(self) -> MCCache:
        """What was read."""
        return self._state.cache

    @property
    def num_tokens(self) -> int:
        """Tokens that every row has read."""
        return int(self.cache.get_seq_length())

    @property
    def num_segments(self) -> int:
        """Finished segments that can be read, per layer."""
        return self.cache.num_segments

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return self.cache.nbytes + (0 if self._state.last is None else self._state.last.nbytes)

    @property
    def logits(self) -> torch.Tensor:
        """`[B, vocab_size]`, of the next token.

        Raises:
            ValueError: nothing was read yet, or a model without a head.
        """
        if self._state.last is None:
            raise ValueError("Stream: nothing was read yet, feed it first")
        with torch.inference_mode():
            return self._head(self._state.last)

    # ------------------------------------------------------------------------------------------------------- reading
    def feed(self, ids: Tokens) -> None:
        """Read tokens: `[B, T]` int64 or int32, `[T]` or a list for one row, or embeddings `[B, T, hidden_size]`.

        Raises:
            ValueError: another shape or dtype, or an earlier call did not end: load the stream from its last file.
        """
        for _ in self._read(ids, self._state):
            pass

    @torch.inference_mode()
    def hidden_states(self, ids: Tokens, keep: bool = True) -> torch.Tensor:
        """Hidden states `[B, T, hidden_size]` of tokens or embeddings that follow. `keep`: they are part of the stream
        from then on. Errors: as of `feed`."""
        return torch.cat([hidden for _, hidden in self._read(ids, self._for(keep))], 1)

    @torch.inference_mode()
    def score(self, ids: Tokens, keep: bool = True) -> torch.Tensor:
        """Log probabilities `[B, T]` in fp32, in nats, of tokens that follow; NaN for the first one of a stream.

        Args:
            ids: as of `feed`, no embeddings. keep: they are part of the stream from then on.

        Raises:
            ValueError: as of `feed`; embeddings, or a model without a head.
        """
        ids = self._tokens(ids)
        if ids.is_floating_point():
            raise ValueError("Stream: embeddings have no scores, give `ids`")
        found, start = [], 0
        for before, hidden in self._read(ids, self._for(keep)):
            here = ids[:, start : start + hidden.shape[1]]
            first = torch.full_like(hidden[:, :1], torch.nan) if before is None else before[:, None]
            logits = self._head(torch.cat([first, hidden[:, :-1]], 1)).float()
            found.append(logits.log_softmax(-1).gather(-1, here[..., None].long())[..., 0])
            start += hidden.shape[1]
        return torch.cat(found, 1)

    @torch.inference_mode()
    def next_tokens(
        self,
        max_new_tokens: int,
        *,
        keep: bool = False,
        do_sample: bool = False,
        logits_processor: LogitsProcessorList | None = None,
        stop: int | None = None,
    ) -> torch.Tensor:
        """What comes next, `[B, n]` int64, n at most `max_new_tokens`.

        Args:
            keep: the stream has read them afterwards; by default it stays as it was.
            do_sample: draw, else take the most probable.
            logits_processor: of Transformers, for example a `TemperatureLogitsWarper`; it sees the new tokens alone.
            stop: a token after which a row ends, which is when all rows have met it (`eos_token_id`).

        Raises:
            ValueError: nothing was read yet, a model without a head, a number below 1.
        """
        if max_new_tokens < 1:
            raise ValueError(f"Stream: `max_new_tokens`={max_new_tokens} is not valid, allowed: an integer >= 1")
        logits, state = self.logits, self._for(keep)
        new = torch.empty(self.rows, 0, dtype=torch.int64, device=logits.device)
        ended = torch.zeros(self.rows, dtype=torch.bool, device=logits.device)
        while new.shape[1] < max_new_tokens and not bool(ended.all()):
            scores = logits.float() if logits_processor is None else logits_processor(new, logits.float())
            token = scores.softmax(-1).multinomial(1) if do_sample else scores.argmax(-1, keepdim=True)
            if stop is not None:
                token = torch.where(ended[:, None], stop, token)
                ended = ended | (token[:, 0] == stop)
            new = torch.cat([new, token], 1)
            for _, hidden in self._read(token, state):
                logits = self._head(hidden[:, -1])
        return new

    def reset(self) -> None:
        """Forget everything."""
        self.cache.reset()
        self._state.last = None

    # --------------------------------------------------------------------------------------------------------- files
    def save(self, directory: str | os.PathLike) -> None:
        """Write `directory`/memory.safetensors: the cache, and where the stream stands. It takes its name when it is
        whole, so that a process that is killed loses what it has read since the last one, and nothing else.

        Raises:
            ValueError: nothing was read yet. OSError: it cannot be written.
        """
        tensors, meta = self.cache._contents(self.model)
        bounds = {name: getattr(self.model.config, name) for name in BOUNDS}
        write(directory, tensors | {HIDDEN: self._state.last}, meta | {"stream": bounds})

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        model: nn.Module,
        *,
        piece: int | None = None,
        offload_segments: bool = False,
    ) -> "Stream":
        """Go on with a stream that was saved: `num_tokens` says what of the text comes next.

        Args:
            directory: holds memory.safetensors. model: as it was given, or bounded as the stream was. piece,
                offload_segments: as at first; all else is in the file.

        Raises:
            FileNotFoundError: no file there.
            ValueError: it is damaged, of another model, or holds a memory that is no stream's.
        """
        with reading(directory) as file:
            bounds = file.meta.get("stream")
            if not isinstance(bounds, dict) or set(bounds) != set(BOUNDS) or HIDDEN not in file.found:
                raise ValueError("the memory of no stream: load it with MCCache.from_pretrained")
            rows = file.found[HIDDEN][1][:1]
            stream = cls(model, **bounds, rows=rows[0] if rows else 0, piece=piece)
            cache = MCCache._of_file(file, stream.model, offload_segments=offload_segments)
            last = file.tensors()[HIDDEN]
            if last.shape != (cache._rows, stream.model.config.hidden_size) or not last.isfinite().all():
                raise ValueError(f"tensor {HIDDEN!r} has another shape than the cache, or is not finite")
            stream._state = State(cache, last.to(stream._decoder.device))
        return stream

    # -------------------------------------------------------------------------------------------------------- inside
    @property
    def _decoder(self) -> nn.Module:
        return getattr(self.model, self.model.base_model_prefix, self.model)

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        if not hasattr(self.model, "lm_head"):
            raise ValueError(
                "Stream: `model` has no head, allowed: an MCForCausalLM for scores, logits and next tokens"
            )
        return self.model.lm_head(hidden)

    def _tokens(self, ids: Tokens) -> torch.Tensor:
        """`[B, T]`, or `[B, T, hidden]` of embeddings, on the device of the model."""
        ids = torch.as_tensor(ids, device=self._decoder.device)
        ids = ids[None] if ids.dim() == 1 else ids
        if ids.dim() != 2 + ids.is_floating_point() or len(ids) != self.rows or not ids.numel():
            raise ValueError(
                f"Stream: `ids` must be tokens of shape ({self.rows}, tokens) or embeddings, at least one, got "
                f"{tuple(ids.shape)} of {ids.dtype}"
            )
        return ids

    def _for(self, keep: bool) -> State:
        """What to read into: the stream's own state, or a copy of it."""
        return self._state if keep else copy.deepcopy(self._state)

    @torch.inference_mode()
    def _read(self, ids: Tokens, state: State) -> Iterator[tuple[torch.Tensor | None, torch.Tensor]]:
        """For every piece: the hidden state `[B, hidden]` before it, if any, and its own `[B, t, hidden]`."""
        ids = self._tokens(ids)
        name = "inputs_embeds" if ids.is_floating_point() else "input_ids"
        for part in ids.split(self.piece, 1):
            before, hidden = state.last, self._decoder(**{name: part}, cache=state.cache).last_hidden_state
            state.last = hidden[:, -1].clone()  # not a view, which would keep the piece
            yield before, hidden
