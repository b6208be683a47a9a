# Copyright 2026 the mc-transformers authors.
"""The picture of a model card: bytes of the cache against length, beside keys and values of the same shapes."""

import io
from pathlib import Path

from ..configuration_mc import MCConfig
from .facts import cache_bytes, human_bytes, key_value_bytes, skeleton
from .files import write_file


FIGURE = "memory.png"
LENGTHS = {"1K": 2**10, "4K": 2**12, "16K": 2**14, "64K": 2**16, "256K": 2**18, "1M": 2**20}


def curves(config: MCConfig) -> dict[str, list[int]]:
    """Per line its bytes at every length of `LENGTHS`, of one sequence."""
    model = skeleton(config)
    return {
        "this model's cache": [cache_bytes(config, length, model) for length in LENGTHS.values()],
        "keys and values of a Transformer": [key_value_bytes(config, length) for length in LENGTHS.values()],
    }


def draw_memory(config: MCConfig, folder: str | Path) -> str | None:
    """Write the picture into `folder` and return its name; without matplotlib nothing is written: None."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for (name, values), style in zip(curves(config).items(), ("o-", "s--"), strict=True):
        axes.plot(list(LENGTHS.values()), values, style, markersize=4, label=f"{name}, 1M: {human_bytes(values[-1])}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(list(LENGTHS.values()), list(LENGTHS))
    axes.yaxis.set_major_formatter(lambda value, _: human_bytes(value))
    axes.set(xlabel="tokens", ylabel="bytes of one sequence")
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    write_file(Path(folder) / FIGURE, content.getvalue())
    return FIGURE
