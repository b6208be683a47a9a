# Copyright 2026 the mc-transformers authors.
"""Everything that can be chosen of a distillation, checked before the work."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...configuration_mc import CHOICES


TRAINED = ("memory", "lora", "all")
MEMORIES = ("gated_linear", "gated_delta", "titans")
AGGREGATIONS = ("none", "grm", "ssc")


def wrong(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"`{name}`={value!r} is not valid, allowed: {allowed}")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32: on a GPU, and on a CPU with AMX. AVX-512's bf16 alone is slower."""
    return device.type != "cpu" or torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class Options:
    """What `distil` is to do.

    Attributes:
        teacher: folder or GGUF file of a Llama, Qwen2 or Qwen3, or a folder of this family with attention layers only.
        output: folder of the finished model. work: folder of everything that a resumed call needs.
        text, held_out: files of UTF-8 text, one document each, or folders of .txt files. Without `held_out` every
            tenth document of `text`, by a checksum of its name, is held out.
        layers: numbers of the layers that become memory layers, or "auto:N": the N that cost least on held-out text.
        memory, aggregation, segment_size: of the memory layers. window: the other layers attend to so many tokens
            only (None = to all).
        minutes: of the whole run, on this machine, over all calls; None = only the steps count.
        match_steps, end_steps: of the two trainings; None = until their share of the minutes is over.
        match_share: part of the minutes left after the start that matching gets.
        length: tokens of a training text. batch: texts per step. eval_windows: held-out texts a loss is measured on.
        passes: how often a text's activations are used before they are made anew.
        trained: what the end-to-end stage trains: "memory" (the memory layers' mixers), "lora" (adapters of rank
            `lora_rank` in all other layers too), or "all".
        match_lr, end_lr: peak learning rates. top_k: logits per token that are kept of the teacher.
        device, dtype: where to compute, and in what ("auto": bf16 where that is faster). seed: of the order of texts.
        save_seconds: between two states on disk.
    """

    teacher: str
    output: str
    text: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    layers: tuple[int, ...] | str = "auto:3"
    memory: str = "gated_delta"
    aggregation: str = "grm"
    segment_size: int = 256
    window: int | None = None
    minutes: float | None = 20.0
    match_steps: int | None = None
    end_steps: int | None = None
    match_share: float = 0.4
    length: int = 1024
    batch: int = 2
    eval_windows: int = 8
    passes: int = 4
    trained: str = "memory"
    lora_rank: int = 16
    match_lr: float = 2e-3
    end_lr: float = 3e-4
    top_k: int = 64
    device: str = "cpu"
    dtype: str = "auto"
    seed: int = 0
    work: str | None = None
    save_seconds: float = field(default=60.0, compare=False)

    def __post_init__(self) -> None:
        for name, allowed in {
            "memory": MEMORIES,
            "aggregation": AGGREGATIONS,
            "trained": TRAINED,
            "dtype": ("auto", "float32", "bfloat16"),
        }.items():
            if getattr(self, name) not in allowed:
                raise wrong(name, getattr(self, name), ", ".join(allowed))
        assert set(AGGREGATIONS) <= set(CHOICES["aggregation"])
        for name in ("segment_size", "batch", "eval_windows", "passes", "lora_rank", "top_k"):
            if getattr(self, name) < 1:
                raise wrong(name, getattr(self, name), "a whole number from 1 on")
        for name in ("window", "match_steps", "end_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise wrong(name, getattr(self, name), "a whole number from 1 on, or None")
        if self.length < 2:
            raise wrong("length", self.length, "a whole number from 2 on")
        if self.minutes is None and None in (self.match_steps, self.end_steps):
            raise wrong("minutes", None, "a number above 0, unless match_steps and end_steps are given")
        if self.minutes is not None and not 0 < self.minutes < float("inf"):
            raise wrong("minutes", self.minutes, "a number above 0")
        if not 0 < self.match_share < 1:
            raise wrong("match_share", self.match_share, "a number between 0 and 1")
        if not self.text:
            raise wrong("text", self.text, "one or more files or folders")
        if isinstance(self.layers, str) and not re.fullmatch(r"auto:[1-9]\d*", self.layers):
            raise wrong("layers", self.layers, "numbers of layers, or auto:N")
        if not isinstance(self.layers, str) and (not self.layers or len(set(self.layers)) != len(self.layers)):
            raise wrong("layers", self.layers, "different numbers of layers, one or more, or auto:N")

    @property
    def folder(self) -> Path:
        """Where everything lies that a resumed call needs."""
        return Path(self.work or f"{self.output}-work")

    @property
    def num_auto(self) -> int | None:
        """N of "auto:N"."""
        return int(self.layers.removeprefix("auto:")) if isinstance(self.layers, str) else None

    @property
    def half(self) -> bool:
        """Whether models run in bf16."""
        return self.dtype == "bfloat16" or (self.dtype == "auto" and has_fast_bfloat16(torch.device(self.device)))

    def autocast(self) -> torch.autocast:
        """The context in which models run."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.half)

    def fields(self, rotary: bool) -> dict:
        """What the memory layers' config says beyond the teacher's. Kept segments are read beside a memory that never
        starts anew, and their answers are added with a factor that starts at zero: any read rule begins as "none".

        Args:
            rotary: whether queries and keys of memory layers can be turned as those of the teacher's attention are.
        """
        anchored = {"online_memory": "running", "cached_answers": "added"} if self.aggregation != "none" else {}
        return anchored | {
            "rope": "all" if rotary and self.memory == "gated_linear" else "attention",
            "memory": self.memory,
            "aggregation": self.aggregation,
            "segment_size": self.segment_size,
            "conv_kernel_size": 0,
            "use_output_gate": False,
            "output_norm": "none",
        }
