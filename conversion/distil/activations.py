# Copyright 2026 the mc-transformers authors.
"""What attention layers read and answer while the teacher reads a text."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from ... import MCForCausalLM
from .corpus import Corpus
from .options import Options
from .student import running


Pairs = dict[int, tuple[torch.Tensor, torch.Tensor]]  # by layer: input and answer, `[B, T, hidden]`


@contextmanager
def recorded(teacher: MCForCausalLM, layers: Iterable[int]) -> Iterator[Pairs]:
    """A dictionary that every forward of the teacher fills anew."""
    found: Pairs = {}
    handles = []
    for number in layers:

        def note(module, args, output, number=number):
            found[number] = args[0], output[0]

        handles.append(teacher.model.layers[number].self_attn.register_forward_hook(note))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def activations(
    teacher: MCForCausalLM, layers: list[int], corpus: Corpus, windows: Iterable[int], options: Options
) -> Iterator[Pairs]:
    """Inputs and answers of attention layers, a batch of windows at a time; layers above the last one do not run."""
    windows = list(windows)
    short = list(teacher.model.layers)[: max(layers) + 1]
    with recorded(teacher, layers) as found, running(teacher, short):
        for start in range(0, len(windows), options.batch):
            with options.autocast():
                teacher.model(corpus.batch(windows[start : start + options.batch], options.device), use_cache=False)
            yield dict(found)
