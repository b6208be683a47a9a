# Copyright 2026 the mc-transformers authors.
"""What an export can be asked for, and the models whose graphs cannot express what they do."""

from importlib.util import find_spec

import torch

from ...configuration_mc import LAYER_TYPE, MCConfig


FORMATS = ("onnx", "torch")
WEIGHTS = ("float32", "int8")
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
OLDEST_TORCH = (2, 11)  # Transformers' exporters ask for it
# values of fields that a graph can express; of those that are not named here all
EXPRESSED = {"segmentation": ("constant",), "cache_eviction": ("oldest",)}
UNTRIED = ("lstm", "gru")


def check_config(config: MCConfig) -> None:
    """Refuse a model by the first field that stands in the way.

    Raises:
        ValueError: logarithmic segments, whose levels come and go; a bounded cache that keeps what is read most, a
            choice that a graph of fixed sizes does not hold; attention layers; memories of fused cells.
    """
    for name, allowed in EXPRESSED.items():
        value = getattr(config, name)
        if value not in allowed and not (name == "cache_eviction" and config.max_cached_segments is None):
            raise ValueError(f"export: `{name}`={value!r} is not possible, allowed: {', '.join(map(repr, allowed))}")
    if others := sorted({kind for kind in config.layer_types if kind != LAYER_TYPE}):
        raise ValueError(f"export: `layer_types` with {others[0]!r} is not possible, allowed: {LAYER_TYPE!r} in all")
    if config.memory in UNTRIED:
        raise ValueError(f"export: `memory`={config.memory!r} is not possible, allowed: all but {', '.join(UNTRIED)}")


def check_request(to: str, weights: str, piece: int) -> None:
    """
    Raises:
        ValueError: an unknown format or kind of weights, int8 for torch, or a piece of fewer than two tokens.
    """
    for name, value, allowed in (("to", to, FORMATS), ("weights", weights, WEIGHTS)):
        if value not in allowed:
            raise ValueError(f"export: `{name}`={value!r} is not valid, allowed: {', '.join(map(repr, allowed))}")
    if to == "torch" and weights != "float32":
        raise ValueError(f"export: `weights`={weights!r} is not possible with `to`='torch', allowed: 'float32'")
    if piece < 2:
        raise ValueError(f"export: `piece`={piece} is not valid, allowed: whole numbers from 2 on")


def check_packages(to: str) -> None:
    """
    Raises:
        ImportError: Transformers or torch are too old, or packages of the extra `export` are missing.
    """
    if find_spec("transformers.exporters") is None:
        import transformers

        raise ImportError(f"Transformers {transformers.__version__} has no exporters: needs transformers>=5.24")
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST_TORCH:
        raise ImportError(f"export needs torch>={'.'.join(map(str, OLDEST_TORCH))}, this is {torch.__version__}")
    if missing := [name for name in NEEDED[to] if find_spec(name) is None]:
        raise ImportError(f"{', '.join(missing)} is missing: pip install 'mc-transformers[export]'")
