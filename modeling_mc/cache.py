# Copyright 2026 the mc-transformers authors.
"""MCCache: the memory of a text, as users handle it."""

import copy
import os
import warnings
import weakref

import torch
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import PreTrainedConfig

from ..configuration_mc import LAYER_TYPE
from .borders import Borders
from .cache_layer import MCCacheLayer, is_memory_layer, own_layer
from .cache_layer import MCStaticCacheLayer as MCStaticCacheLayer  # pickles of earlier versions look for it here
from .fingerprint import fingerprint, sampled_fingerprints
from .memory_check import check_description, check_values, num_tokens_of
from .memory_file import MemoryFile, reading, write
from .rollback import Rollback
from .standing import NOTED, attention_at, check_stands, fill_attention, memory_at
from .storage import INT4, Kept
from .summary import Summary
from .transaction import Transaction, transaction_of


OF_A_STREAM = "stream."  # tensors of a memory file that are not of the cache
STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.int8, INT4)


class ModelRef(weakref.ref):
    """The model that filled a cache, which does not keep it alive; None in a cache that comes out of a pickle."""

    def __deepcopy__(self, memo: dict) -> "ModelRef":
        return self

    def __reduce__(self) -> tuple:
        return type(None), ()


class MCCache(DynamicCache):
    """A `DynamicCache` of this family with the numbers that are useful to know about a memory.

    Args:
        config: the model's config.
        offload_segments: keep the states of finished segments in host memory; only their summaries stay on the
            device, and "ssc" fetches just the chosen states.
        state_dtype: how finished segments' states are stored: None (fp32), torch.bfloat16, torch.float16, torch.int8
            or "int4" (one scale per row of a state). Anything but None is an approximation.
        keep_borders: note at every border what else it takes to stand there again (`at_segment`, `rewind`): tails of
            convolutions, and running states that are not kept exactly.
        kwargs: of `DynamicCache`.

    Raises:
        ValueError: another `state_dtype`, or a `config` of another kind.

    Example:
        >>> config = MCConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
        >>> cache = MCCache(config)
        >>> out = MCForCausalLM(config)(torch.ones(1, 600, dtype=torch.long), cache=cache)
        >>> cache.get_seq_length(), cache.num_segments
        (600, 2)
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        offload_segments: bool = False,
        state_dtype: torch.dtype | str | None = None,
        keep_borders: bool = False,
        **kwargs,
    ) -> None:
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise ValueError(f"MCCache: `config` must be the model's config, got {type(config).__name__}")
        super().__init__(config=config, **kwargs)
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"MCCache: `state_dtype`={state_dtype} is not valid, allowed: {STATE_DTYPES}")
        self.layers = [own_layer(layer) if is_memory_layer(layer) else layer for layer in self.layers]
        self.filled_by: ModelRef | None = None  # the model, for the fingerprint of `save_pretrained`
        for layer in self.memory_layers:
            layer.kept_dtype = state_dtype
            layer.kept_device = torch.device("cpu") if offload_segments else None
            layer.keep_borders = keep_borders

    @property
    def memory_layers(self) -> list[MCCacheLayer]:
        """The caches of the memory layers, in their order."""
        return [layer for layer in self.layers if is_memory_layer(layer)]

    @property
    def num_segments(self) -> int:
        """Finished segments kept per memory layer (of the longest row)."""
        return max((layer.num_segments for layer in self.memory_layers), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds, attention layers' keys and values included."""
        total = sum(layer.nbytes for layer in self.memory_layers)
        for layer in self.layers:
            if not is_memory_layer(layer):
                total += sum(t.nbytes for t in (layer.keys, layer.values) if t is not None)
        return total

    # ------------------------------------------------------------------------------------------------------- asking
    def prompt(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.LongTensor]:
        """What `generate` wants of a text that goes on from this memory: `generate(**cache.prompt(ids), cache=cache)`.

        `generate` takes the ids of everything that was read, counts them, and looks at what comes after them only.
        Here zeros stand for what was read, so the ids of the document need not be at hand (repetition penalties see
        them, and `generate` returns them). `cache.prompt(**tokenizer(text, return_tensors="pt"))` works too.

        Args:
            input_ids: `[B, T]` int64 or int32, what follows in every row of the cache; padding on the left.
            attention_mask: `[B, T]`, 0 = padding; None = none. Beside attention layers, a document that was read with
                padding needs the mask of the whole, `[B, read + T]`.

        Returns:
            `input_ids` and `attention_mask`, `[B, read + T]` each; of an empty cache the text alone.

        Raises:
            ValueError: ids of another dtype, shape or number of rows than the cache, none at all, a mask of another
                shape, padding on the right, or a document with padding beside attention layers without its mask.
        """
        kind = getattr(input_ids, "dtype", type(input_ids).__name__)
        if kind not in (torch.int64, torch.int32) or input_ids.ndim != 2 or not input_ids.numel():
            found = f"{tuple(input_ids.shape)} of {kind}" if isinstance(input_ids, torch.Tensor) else kind
            raise ValueError(
                f"`input_ids` must be int64 or int32 of shape (rows, tokens), at least one each, got {found}"
            )
        self._check_whole()
        rows, num_tokens = input_ids.shape
        seen = int(self.get_seq_length())
        if seen and self._rows != rows:
            raise ValueError(
                f"`input_ids` has {rows} rows and the cache {self._rows}, allowed: as many; to ask several questions, "
                "`batch_repeat_interleave(n)` makes n rows of every one of the cache"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if tuple(attention_mask.shape) not in ((rows, num_tokens), (rows, seen + num_tokens)):
            raise ValueError(
                f"`attention_mask` must have shape {(rows, num_tokens)} or, with what was read, "
                f"{(rows, seen + num_tokens)}, got {tuple(attention_mask.shape)}"
            )
        if not bool((attention_mask[:, -1] != 0).all()):
            raise ValueError("`attention_mask` ends with padding: pad on the left, answers go on from the last token")
        missing = seen + num_tokens - attention_mask.shape[1]
        if missing and self._padded_attention(seen):
            raise ValueError(
                "`attention_mask` covers the new tokens only, and attention layers must know where the document had "
                f"padding: give the mask of all {seen + num_tokens} tokens"
            )
        return {
            "input_ids": nn.functional.pad(input_ids, (seen, 0)),
            "attention_mask": nn.functional.pad(attention_mask, (missing, 0), value=1),
        }

    def reset(self) -> None:
        """Forget everything, attention layers' keys and values too, which some versions of Transformers only zero."""
        super().reset()
        for layer in self.layers:
            if not is_memory_layer(layer):
                layer.keys = layer.values = None
                layer.is_initialized = False
                if hasattr(layer, "cumulative_length"):
                    layer.cumulative_length = 0

    def at_segment(self, number: int) -> "MCCache":
        """A cache that stands at a border of what was read: it goes on as if only the first `number` segments of every
        row had been read, without padding. It shares the kept states with this one; neither changes the other.

        Args:
            number: from 0 (nothing was read) to the finished segments of the shortest row.

        Raises:
            ValueError: another number, a border that was not noted while it was passed (`keep_borders`), at which
                forgotten segments or tokens of a sliding window could be read, padding beside attention layers, or a
                model with logarithmic segments or cache_eviction="least_read".
        """
        model, borders, seen = self._standing()
        mixers = {i: layer.mixer for i, layer in enumerate(model.layers) if hasattr(layer, "mixer")}
        for mixer in mixers.values():
            check_stands(mixer)
        most = borders.finished(seen)
        if type(number) is not int or not 0 <= number <= most:
            raise ValueError(f"at_segment: `number`={number!r} is not valid, allowed: 0 to {most}")
        if number and self._padded_attention(int(self.get_seq_length())):
            raise ValueError("at_segment: attention layers have read padding, allowed: rows without, or `number`=0")
        new = MCCache(config=model.config)
        for index, (layer, fresh) in enumerate(zip(self.layers, new.layers, strict=True)):
            for name in ("kept_dtype", "kept_device", "keep_borders", "record_past"):
                if hasattr(fresh, name):
                    setattr(fresh, name, getattr(layer, name))
            if number and index in mixers:
                memory_at(layer, fresh, mixers[index], number)
            elif number:
                attention_at(layer, fresh, borders.start(number))
        new.filled_by = self.filled_by
        return new

    def rewind(self, tokens: int) -> int:
        """Go back, in place, to the last border that is not behind the first `tokens` tokens of every row: a text that
        differs from there on is read from there on, `model.generate(ids, cache=cache)`.

        Returns:
            how many tokens of every row this cache has read now.

        Raises:
            ValueError: fewer than 0 or more tokens than were read, or as `at_segment`.
        """
        _, borders, seen = self._standing()
        if type(tokens) is not int or not 0 <= tokens <= seen:
            raise ValueError(f"rewind: `tokens`={tokens!r} is not valid, allowed: 0 to {seen}")
        self.layers = self.at_segment(borders.finished(tokens)).layers
        return borders.start(borders.finished(tokens))

    def _standing(self) -> tuple[nn.Module, Borders, int]:
        """The model that filled this cache, its borders, and the real tokens of the shortest row."""
        self._check_whole()
        model = self.filled_by and self.filled_by()
        if model is None:
            raise ValueError("the model that filled this cache is no longer known, or nothing was read yet")
        rows = [int(layer.position.min()) for layer in self.memory_layers if layer.is_initialized]
        return model, Borders.of(model.config), min(rows, default=int(self.get_seq_length()))

    def detached(self) -> "MCCache":
        """A copy that gradients do not pass: for truncated back-propagation, from piece to piece of a long text.

        Raises:
            ValueError: a static cache, or a forward into this one did not end.
        """
        self._check_whole()
        if any(layer.is_compileable for layer in self.layers):
            raise ValueError("detached needs a dynamic cache: tensors of a static one stay where they are")
        new = copy.copy(self)
        new.layers = [copy.copy(layer) for layer in self.layers]
        for layer in new.layers:
            if is_memory_layer(layer):
                layer.storage, layer.rollback = copy.copy(layer.storage), Rollback()
                layer.storage.snapshot, layer.transaction = None, Transaction()
                layer.storage.map(lambda t: t.detach().clone())
            elif layer.is_initialized:
                layer.keys, layer.values = layer.keys.detach().clone(), layer.values.detach().clone()
        return new

    def begin_rows(self, rows: torch.Tensor, model: nn.Module) -> None:
        """Some rows begin a new text: what they read is forgotten, as if each were the row of a new cache. Gradients
        reach the learned first states of memories. `get_seq_length` is the longest row's number of tokens then.

        Args:
            rows: `[B]` bool. model: the one that fills this cache.

        Raises:
            ValueError: another shape or dtype, beside attention layers, a static cache, while tokens are recorded for
                `crop` or borders noted, or a forward into this cache did not end.
        """
        self._check_whole()
        if not any(layer.is_initialized for layer in self.layers):
            return
        if rows.dtype != torch.bool or tuple(rows.shape) != (self._rows,):
            raise ValueError(
                f"`rows` must be bool of shape ({self._rows},), got {rows.dtype} of shape {tuple(rows.shape)}"
            )
        mixers = {module.layer_idx: module for module in model.modules() if hasattr(module, "cache_signature")}
        records = [x.is_compileable or x.record_past or x.keep_borders for x in self.memory_layers]
        if len(mixers) < len(self.layers) or any(records):
            raise ValueError(
                "begin_rows needs a dynamic cache of memory layers alone, of all layers of `model`, that records "
                "nothing for `crop` or `rewind`"
            )
        for index, layer in enumerate(self.layers):
            layer.check(mixers[index].cache_signature, self._rows)
            mixers[index].begin_rows(layer, rows)

    def _check_whole(self) -> None:
        """Refuse a cache that a forward has left half-written, or is writing into."""
        if (transaction := transaction_of(self)) is not None:
            transaction.check()

    @property
    def _rows(self) -> int:
        """Rows of the batch that was read."""
        layer = next(layer for layer in self.layers if layer.is_initialized)
        return len(layer.position if is_memory_layer(layer) else layer.keys)

    def _padded_attention(self, seen: int) -> bool:
        """Whether there are attention layers, and rows in which some of the tokens read were padding."""
        memories = [layer for layer in self.memory_layers if layer.is_initialized]
        return len(memories) < len(self.layers) and any(bool((layer.position < seen).any()) for layer in memories[:1])

    # -------------------------------------------------------------------------------------------------------- files
    def save_pretrained(self, directory: str | os.PathLike, model: nn.Module | None = None) -> None:
        """Write the whole memory to `directory`/memory.safetensors, with a fingerprint of the model that filled it.

        Args:
            directory: created if it is missing; a memory in it is replaced once the new one is written.
            model: the model that filled this cache; the one that last did is known.

        Raises:
            ValueError: nothing was read into the cache yet, the model that filled it is gone and not passed, or a
                forward into it did not end.
        """
        write(directory, *self._contents(model))

    def _contents(self, model: nn.Module | None) -> tuple[dict[str, torch.Tensor], dict]:
        """Tensors and description of a memory file. Args and errors: as of `save_pretrained`."""
        self._check_whole()
        if not self.layers or not all(layer.is_initialized for layer in self.layers):
            raise ValueError("an empty cache cannot be saved: run the model on a text first")
        model = model if model is not None else self.filled_by and self.filled_by()
        if model is None:
            raise ValueError("the model that filled this cache is no longer known: pass it as `model`")
        tensors, layers = {}, []
        for index, layer in enumerate(self.layers):
            if is_memory_layer(layer):
                parts = {name: x for name, x in layer.tensors.items() if not name.startswith(NOTED)}
                about = {"signature": layer.signature, "num_tokens": int(layer.num_tokens)}
            else:
                stays = (
                    slice(-layer.sliding_window + 1, None) if layer.is_sliding else slice(None)
                )  # not what is recorded
                parts = {"keys": layer.keys[:, :, stays], "values": layer.values[:, :, stays]}
                about = {"cumulative_length": int(getattr(layer, "cumulative_length", 0))}
            tensors |= {f"{index}.{name}": tensor for name, tensor in parts.items()}
            layers.append(about)
        kept = {layer.kept_dtype for layer in self.memory_layers}
        dtype = str(kept.pop()).removeprefix("torch.") if kept else "None"
        base = getattr(model, getattr(model, "base_model_prefix", ""), model)
        meta = {"layers": layers, "state_dtype": dtype, "fingerprint": fingerprint(base)}
        check_values(tensors, int(self.get_seq_length()), Borders.of(base.config))
        return tensors, meta

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike, model: nn.Module, **kwargs) -> "MCCache":
        """The memory that `save_pretrained` wrote, on the devices of `model`.

        Args:
            directory: holds memory.safetensors.
            model: the one that filled the memory, same config and weights.
            kwargs: of the new `MCCache`, for example `offload_segments`; `state_dtype` is as it was.

        Raises:
            FileNotFoundError: no memory file there. PermissionError: it may not be read.
            ValueError: the file is damaged, was written by a model of another architecture or other weights, or holds
                what no cache of `model` can hold.
        """
        with reading(directory) as file:
            return cls._of_file(file, model, **kwargs)

    @classmethod
    def _of_file(cls, file: MemoryFile, model: nn.Module, **kwargs) -> "MCCache":
        """The memory in an open file. Args and errors: as of `from_pretrained`."""
        base = getattr(model, getattr(model, "base_model_prefix", ""), model)
        cache, meta = cls(config=getattr(base, "config", None), state_dtype=None, **kwargs), file.meta
        _check_writer(meta, base)
        for layer in cache.memory_layers:
            layer.kept_dtype = _state_dtype(meta)
        found = {name: about for name, about in file.found.items() if not name.startswith(OF_A_STREAM)}
        check_description(meta, found, base, cache.layers)
        tensors = {name: tensor for name, tensor in file.tensors().items() if name in found}
        check_values(tensors, num_tokens_of(meta, found, cache.layers), Borders.of(base.config))
        for index, (layer, about) in enumerate(zip(cache.layers, meta["layers"], strict=True)):
            device = next(base.layers[index].parameters()).device
            parts = {n.split(".", 1)[1]: t.to(device) for n, t in tensors.items() if n.split(".", 1)[0] == str(index)}
            if is_memory_layer(layer):
                kept = layer.kept_device or device
                layer.tensors = {n: t.to(kept) if n.startswith(("kept.", "scale.")) else t for n, t in parts.items()}
                layer.signature, layer.num_tokens = base.layers[index].mixer.cache_signature, about["num_tokens"]
                layer.lazy_initialization(parts["state.0"])
            else:
                fill_attention(layer, parts["keys"], parts["values"], about.get("cumulative_length", 0))
        cache.filled_by = ModelRef(base)
        return cache

    @classmethod
    def cat(cls, caches: list["MCCache"], model: nn.Module) -> "MCCache":
        """One memory of several documents that were read on their own, in this order.

        Every segment of every document can be read afterwards, an unfinished last one too (as one more segment); the
        text goes on after the last document. Exact for what the first layer keeps. Higher layers' memories are what
        each document alone left behind: reading the documents one after the other would have let later ones see
        earlier ones.

        Args:
            caches: of the same model, each a batch of one row.
            model: the one that filled them.

        Raises:
            ValueError: not exactly one row each, or a model for which documents can't be put side by side: attention
                layers, state_init="checkpoint", segmentation="logarithmic", aggregation="none", a bounded cache.
        """
        config = model.config
        fits = config.state_init == "independent" and config.segmentation == "constant"
        fits = fits and config.aggregation != "none" and config.max_cached_segments is None
        fits = fits and config.online_memory == "segment"  # one memory of both texts cannot be made of two
        if not fits or set(config.layer_types) != {LAYER_TYPE}:
            raise ValueError(
                "MCCache.cat needs memory_caching layers only, an aggregation other than 'none', "
                "state_init='independent', online_memory='segment', segmentation='constant' and "
                "max_cached_segments=None"
            )
        layers = [cache.layers for cache in caches]
        if not caches or any(
            len(each) != config.num_hidden_layers or any(not x.is_initialized or len(x.position) != 1 for x in each)
            for each in layers
        ):
            raise ValueError("MCCache.cat: `caches` must be one or more filled caches with a batch of one row each")
        for cache in caches:
            cache._check_whole()
        joined = cls(config=config)
        for index, layer in enumerate(joined.layers):
            parts = [cache.layers[index] for cache in caches]
            for part in parts:
                part.check(parts[0].signature, 1)
            _join(layer, parts, Borders.of(config), config.summaries_per_segment)
        joined.filled_by = ModelRef(getattr(model, model.base_model_prefix, model))
        return joined


def _check_writer(meta: dict, model: nn.Module) -> None:
    """Refuse a memory of another model."""
    if meta["version"] == 1:
        warnings.warn(
            "a memory file of format 1 tells models apart by samples of their weights only: save it again",
            stacklevel=3,
        )
        same = meta.get("fingerprint") in sampled_fingerprints(model)
    else:
        same = meta.get("fingerprint") == fingerprint(model)
    if not same:
        raise ValueError(
            "this memory was written by another model (other architecture or weights): a memory can be read only by "
            "the model that wrote it"
        )


def _state_dtype(meta: dict) -> torch.dtype | str | None:
    names = {str(dtype).removeprefix("torch."): dtype for dtype in STATE_DTYPES}
    name = meta.get("state_dtype")
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"`state_dtype` must be one of {', '.join(names)}")
    return names[name]


def _join(layer: MCCacheLayer, parts: list[MCCacheLayer], borders: Borders, num_blocks: int) -> None:
    """Fill `layer` with the segments of `parts`, the unfinished ones of all but the last counted as finished."""
    rows: dict[str, list[torch.Tensor]] = {}
    for number, part in enumerate(parts):
        finished, rest = borders.finished(int(part.position)), borders.offset(int(part.position))
        states = Kept(part.storage).all()
        found = {f"kept.{i}": state[:, :finished] for i, state in enumerate(states)}
        if "summaries" in part.tensors:
            found["summaries"] = part.tensors["summaries"][:, :finished]
        if rest and number < len(parts) - 1:
            for i in range(len(states)):
                found[f"kept.{i}"] = torch.cat([found[f"kept.{i}"], part.tensors[f"state.{i}"]], 1)
            if "summaries" in found:
                count = borders.offset(part.position)[:, None]
                mean = Summary(borders, num_blocks).mean(part.tensors["sums"], count)
                found["summaries"] = torch.cat([found["summaries"], mean], 1)
        for name, tensor in found.items():
            rows.setdefault(name, []).append(tensor)
    last = parts[-1]
    layer.signature = last.signature
    layer.tensors = {name: x for name, x in last.tensors.items() if not name.startswith("scale.")}  # decoded by now
    for name, tensors in rows.items():  # where they are computed, which need not be where `last` keeps them
        layer.storage.put(name, torch.cat([*tensors, tensors[-1].new_zeros(1, 1, *tensors[-1].shape[2:])], 1))
    finished = layer.tensors["kept.0"].shape[1] - 1
    position = borders.start(finished) + borders.offset(int(last.position))
    layer.storage.put("position", torch.full_like(last.position, position))
    layer.lazy_initialization(last.tensors["state.0"])
    layer.num_tokens = position
