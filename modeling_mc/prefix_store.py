# Copyright 2026 the mc-transformers authors.
"""Prefixes that were read once: prompts that begin alike are read from where they part."""

import hashlib
import os
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn

from .cache import MCCache
from .compat import CACHE_NAME
from .fingerprint import fingerprint
from .prefix_files import PrefixFiles
from .prefix_parts import Parts, assemble, begin, forget_borders, segments_apart, side_by_side, take


PIECE = 4096  # tokens of a prompt that are read at a time


@dataclass(eq=False)
class Prefix:
    """A text that was read, of whole segments: its last segment, behind another prefix.

    Attributes:
        key: hash of the parent's key and the ids. ids: int64 tokens of the last segment. parent: None = the first.
        parts: what the segment left in a cache.
    """

    key: bytes
    ids: bytes
    parent: "Prefix | None"
    parts: Parts

    @property
    def nbytes(self) -> int:
        return len(self.ids) + sum(x.nbytes for part in self.parts for x in part.values())


class PrefixStore:
    """Remembers what segments of prompts left behind, for prompts that begin with the same tokens:
    `model.generate(ids, prefix_store=store)`.

    A prompt is cut into segments; each is found by a chained hash of its tokens, those before it, and the weights,
    and its tokens are compared too. The states of the longest known prefix are put together, the rest is read and
    stored. Answers are those of a fresh read. Rows of a batch are read one after the other, so that a row finds what
    the one before it has stored.

    Nothing is remembered (a counted miss) with `segmentation="logarithmic"` or `"content"` or
    `cache_eviction="least_read"`, whose caches cannot be told apart by segments, with a cache of rounded, offloaded or
    noted states, with a static cache, `use_cache=False`, `inputs_embeds`, assisted decoding, or padding that is not on
    the left.

    Args:
        model: whose prompts these are, also one with a head.
        max_bytes: of all tensors that are held; prefixes used longest ago are forgotten.
        folder: also keep the segments as files there, for other processes and later ones; None = in memory only.
        max_folder_bytes: of these files; those used longest ago are removed. None = no limit.

    Raises:
        ValueError: `max_bytes` or `max_folder_bytes` below 1, or `model` is not of this family.
        OSError: `folder` cannot be made.

    Example:
        >>> model = MCForCausalLM(MCConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
        >>> store, prompt = PrefixStore(model, max_bytes=10**8), torch.ones(1, 700, dtype=torch.long)
        >>> for _ in range(2):
        ...     answer = model.generate(prompt, max_new_tokens=4, prefix_store=store)
        >>> store.stats()["hits"], store.stats()["tokens_saved"]
        (1, 512)
    """

    def __init__(
        self,
        model: nn.Module,
        max_bytes: int,
        folder: str | os.PathLike | None = None,
        max_folder_bytes: int | None = None,
    ) -> None:
        for name, value in (("max_bytes", max_bytes), ("max_folder_bytes", max_folder_bytes)):
            if not (name == "max_folder_bytes" and value is None) and (type(value) is not int or value < 1):
                raise ValueError(f"PrefixStore: `{name}`={value!r} is not valid, allowed: whole numbers from 1 on")
        base = _decoder(model)
        self._root(base)  # refuses what is none of this family
        self._model = weakref.ref(base)
        self.max_bytes = max_bytes
        self._files = None if folder is None else PrefixFiles(folder, max_folder_bytes)
        self._lock = threading.RLock()
        # used longest ago first, and a prefix never after one that it is the beginning of
        self._known: OrderedDict[bytes, Prefix] = OrderedDict()
        self._bytes = 0
        self._counts = dict.fromkeys(
            ("hits", "misses", "unsupported", "tokens_saved", "tokens_read", "evictions", "collisions"), 0
        )

    # ------------------------------------------------------------------------------------------------- for the user
    def stats(self) -> dict[str, int]:
        """What the store did and holds.

        Returns:
            `hits`, `misses`: rows of prompts of which a beginning was known, or not; `unsupported`: misses that had
            to be, see the class; `tokens_saved`, `tokens_read`: of these prompts; `bytes`, `segments`: what is held;
            `evictions`: segments forgotten for want of room; `collisions`: other tokens under the same hash;
            `refused`: damaged files.
        """
        with self._lock:
            held = {"bytes": self._bytes, "segments": len(self._known)}
            return self._counts | held | {"refused": self._files.refused if self._files else 0}

    def clear(self) -> None:
        """Forget all prefixes; files and counts stay."""
        with self._lock:
            self._known.clear()
            self._bytes = 0

    @torch.no_grad()
    def read(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> MCCache | None:
        """Read all but the last token of every row, from where the prompts part from what is known.

        Args:
            input_ids: `[B, T]` int64. attention_mask: `[B, T]`, 0 = padding, on the left; None = none.

        Returns:
            a cache that has read `[B, T - 1]`, as `generate` wants it with these ids and mask; None where the store
            cannot serve, which is counted.

        Raises:
            ValueError: the model is gone.
        """
        model = self._model()
        if model is None:
            raise ValueError("PrefixStore: the model that it was made for is gone")
        rows, width = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
        mixers = [block.mixer for block in model.layers if hasattr(block, "mixer")]
        left = tuple(mask.shape) == (rows, width) and bool((mask[:, 1:] >= mask[:, :-1]).all() & mask[:, -1].all())
        if width < 2 or not left or not all(mixer.history.stands for mixer in mixers):
            return self._cannot(rows, unsupported=width > 1)
        root, ids = self._root(model), input_ids.cpu()
        starts = (width - mask.sum(1)).tolist()
        caches = [self._row(ids[row, start:-1], root, model) for row, start in enumerate(starts)]
        if rows == 1 and not starts[0]:
            return caches[0]
        return side_by_side(caches, model, width - 1)

    def prepare(self, model: nn.Module, inputs: torch.Tensor | None, options: dict, settings: object) -> dict:
        """What of the arguments of `generate` changes when it begins with this store: cache and mask.

        Args:
            inputs: its first argument. options: its keywords. settings: its generation config, for what these lack.

        Raises:
            ValueError: the store is of another model, or `cache` has read something already.
        """
        if _decoder(model) is not self._model():
            raise ValueError(
                "`prefix_store` was made for another model: make one of this model, PrefixStore(model, ...)"
            )
        ids, cache = inputs if inputs is not None else options.get("input_ids"), options.get(CACHE_NAME)
        if cache is not None and int(cache.get_seq_length()):
            raise ValueError("`cache` has read something already: leave out `prefix_store`, or pass an empty cache")

        def asked(name: str):
            return options[name] if name in options else getattr(settings, name, None)

        off = ("inputs_embeds", "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        off = any(asked(name) is not None for name in (*off, "cache_implementation")) or asked("use_cache") is False
        if off or ids is None or (cache is not None and not _is_plain(cache)):
            self._cannot(1 if ids is None else len(ids), unsupported=True)
            return {}
        mask = options.get("attention_mask")
        mask = _mask_of_padding(ids, asked("pad_token_id"), asked("eos_token_id")) if mask is None else mask
        made = self.read(ids, mask)
        if made is None:
            return {}
        made.batch_repeat_interleave(max(asked("num_beams") or 1, asked("num_return_sequences") or 1))
        if cache is not None:
            cache.layers, cache.filled_by = made.layers, made.filled_by
            made = cache
        changed = {CACHE_NAME: made, "attention_mask": mask}
        if asked("prefill_chunk_size") is not None:
            # the rest is one token, which older versions of Transformers would read in pieces with all that is known
            changed["prefill_chunk_size"] = None
        return changed

    # ---------------------------------------------------------------------------------------------------- one prompt
    def _cannot(self, rows: int, unsupported: bool) -> None:
        with self._lock:
            self._counts["misses"] += rows
            self._counts["unsupported"] += rows * unsupported

    def _row(self, ids: torch.LongTensor, root: bytes, model: nn.Module) -> MCCache:
        """Read tokens `[n]` into a cache of one row, and store the segments that are new."""
        size = model.config.segment_size
        segments = [_bytes_of(segment) for segment in ids.split(size) if len(segment) == size]
        with self._lock:
            path = self._find(segments, root, model)
            self._counts["hits" if path else "misses"] += 1
            self._counts["tokens_saved"] += len(path) * size
            self._counts["tokens_read"] += len(ids) - len(path) * size
        cache = assemble([prefix.parts for prefix in path], model) if path else None
        cache = cache or MCCache(config=model.config, keep_borders=True)
        stores, apart = True, segments_apart(model, PIECE)
        for first in range(len(path), len(segments), apart):
            stop = min(first + apart, len(segments))
            self._forward(ids[first * size : stop * size], cache, model)
            for number in range(first, stop):
                stores = stores and self._add(path, segments[number], take(cache, number), root)
        if rest := len(ids) % size:
            self._forward(ids[-rest:], cache, model)
        return forget_borders(cache if len(ids) else begin(cache, model))

    @staticmethod
    def _forward(ids: torch.LongTensor, cache: MCCache, model: nn.Module) -> None:
        model(ids[None].to(model.device), cache=cache)

    def _find(self, segments: list[bytes], root: bytes, model: nn.Module) -> list[Prefix]:
        """The longest known beginning, as the prefixes that lead to it."""
        path: list[Prefix] = []
        for ids in segments:
            parent = path[-1] if path else None
            key = _hash(parent.key if parent else root, ids)
            known = self._known.get(key)
            if known is None and self._files is not None:
                parts = self._files.load(key, _about(root, parent, ids), model)
                if parts is not None:
                    known = Prefix(key, ids, parent, parts)
                    self._hold(known, [*path, known])
            if known is None or known.ids != ids or known.parent is not parent:
                self._counts["collisions"] += known is not None
                break
            path.append(known)
        self._use(path)
        return path

    def _add(self, path: list[Prefix], ids: bytes, parts: Parts, root: bytes) -> bool:
        """Store one more segment behind `path`, which grows by it. Returns whether the next one may be stored too."""
        parent = path[-1] if path else None
        new = Prefix(_hash(parent.key if parent else root, ids), ids, parent, parts)
        with self._lock:
            known = self._known.get(new.key)
            if known is not None:  # of another thread, or a collision
                path.append(known)
                return known.ids == ids and known.parent is parent
            if any(self._known.get(prefix.key) is not prefix for prefix in path):  # forgotten in the meantime
                return False
            path.append(new)
            held = self._hold(new, path)
        if held and self._files is not None:
            self._files.save(new.key, _about(root, parent, ids), parts)
        return held

    def _hold(self, new: Prefix, path: list[Prefix]) -> bool:
        """Take in a prefix, the last one of `path`, and forget others for it. Returns whether it has found room."""
        self._known[new.key] = new
        self._bytes += new.nbytes
        self._use(path)
        while self._bytes > self.max_bytes:
            _, old = self._known.popitem(last=False)
            self._bytes -= old.nbytes
            self._counts["evictions"] += old is not new
        return new.key in self._known

    def _use(self, path: list[Prefix]) -> None:
        for prefix in reversed(path):
            if self._known.get(prefix.key) is prefix:
                self._known.move_to_end(prefix.key)

    @staticmethod
    def _root(model: nn.Module) -> bytes:
        """Of everything besides the tokens that decides what a cache holds: config, weights, which adapters are on."""
        adapters = [
            (name, module.disable_adapters, module.merged_adapters, list(module.active_adapters))
            for name, module in model.named_modules()
            if hasattr(module, "merged_adapters")  # a layer of PEFT
        ]
        return hashlib.sha256(f"{fingerprint(model)} {model.dtype} {adapters}".encode()).digest()


def _decoder(model: nn.Module) -> nn.Module:
    return getattr(model, getattr(model, "base_model_prefix", ""), model)


def _hash(parent: bytes, ids: bytes) -> bytes:
    return hashlib.sha256(parent + ids).digest()


def _bytes_of(ids: torch.LongTensor) -> bytes:
    return ids.to(torch.int64).contiguous().numpy().tobytes()


def _about(root: bytes, parent: Prefix | None, ids: bytes) -> dict:
    """What a file must say of a segment."""
    return {"model": root.hex(), "parent": parent.key.hex() if parent else "", "ids": hashlib.sha256(ids).hexdigest()}


def _is_plain(cache: object) -> bool:
    layers = getattr(cache, "memory_layers", None)
    return isinstance(cache, MCCache) and not any(x.kept_dtype or x.kept_device or x.keep_borders for x in layers)


def _mask_of_padding(ids: torch.LongTensor, pad: int | None, ends: int | list[int] | None) -> torch.LongTensor:
    """The mask that `generate` makes of padding tokens when none is given."""
    ends = ends if isinstance(ends, list) else [ends]
    known = pad is not None and pad not in ends and bool((ids == pad).any())
    return (ids != pad).long() if known else torch.ones_like(ids)
