# Copyright 2026 the mc-transformers authors.
"""The kinds of checkpoints that can be converted, by the name that `--from` takes."""

from ..source import Source
from . import fla_gated_deltanet, fla_linear, llama, mamba2, olmo_hybrid, qwen, retnet


# where several know a config's model type, the first one converts it
SOURCES: dict[str, Source] = {
    module.SOURCE.name: module.SOURCE
    for module in (mamba2, fla_linear, retnet, fla_gated_deltanet, olmo_hybrid, qwen, llama)
}
