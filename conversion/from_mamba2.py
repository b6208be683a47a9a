# Copyright 2026 the mc-transformers authors.
"""Mamba-2, in the layout of Transformers and in that of its authors, to `gated_linear` with step gates.

The projection's rows are [z, x, B, C, dt]: output gate, values, keys, queries, step sizes.
"""

import torch

from .convert import Source, keep, refuse


def _heads(found: dict) -> int:
    return found["num_heads"]


def make_config(found: dict) -> dict:
    width = int(found.get("expand", 2) * found["hidden_size"])
    low, high = found.get("time_step_limit", (0.0, float("inf")))
    if low != 0.0 or high != float("inf"):
        refuse("limits of the step size (time_step_limit)", (low, high), "(0, inf)")
    if found.get("use_bias"):
        refuse("biases in the projections (use_bias)", True, "False")
    if found.get("hidden_act", "silu") != "silu":
        refuse("another activation (hidden_act)", found["hidden_act"], "'silu'")
    if _heads(found) * found["head_dim"] != width:
        refuse("heads that do not fill the inner width (num_heads * head_dim)", _heads(found), str(width))
    return {
        "vocab_size": found["vocab_size"],
        "hidden_size": found["hidden_size"],
        "intermediate_size": 0,
        "num_hidden_layers": found["num_hidden_layers"],
        "num_attention_heads": _heads(found),
        "num_key_heads": found["n_groups"],
        "head_dim": found["state_size"],
        "value_head_dim": found["head_dim"],
        "rms_norm_eps": found.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": found.get("tie_word_embeddings", False),
        "conv_kernel_size": found["conv_kernel"],
        "conv_bias": found.get("use_conv_bias", True),
        "qk_norm": False,
        "memory": "gated_linear",
        "gate_form": "step",
        "value_skip": True,
        "output_norm": "gated",
        **{name: found.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }


def _sizes(found: dict) -> tuple[int, int, int]:
    """Values, keys (or queries), heads."""
    return _heads(found) * found["head_dim"], found["n_groups"] * found["state_size"], _heads(found)


def _projection(tensor: torch.Tensor, found: dict) -> tuple[torch.Tensor, ...]:
    values, keys, heads = _sizes(found)
    return tensor.split([values, values, keys, keys, heads])


def _convolution(tensor: torch.Tensor, found: dict) -> tuple[torch.Tensor, ...]:
    values, keys, _ = _sizes(found)
    return tensor.split([values, keys, keys])


LAYER, MIXER = r"backbone\.layers\.(\d+)\.", r"model.layers.\1.mixer."
CONV = tuple(f"{MIXER}{name}_conv." for name in "vkq")
SOURCE = Source(
    name="mamba2",
    model_types=("mamba2",),
    make_config=make_config,
    rules=(
        (r"backbone\.embeddings?\.weight", ("model.embed_tokens.weight",), keep),
        (r"backbone\.norm_f\.weight", ("model.norm.weight",), keep),
        (r"lm_head\.weight", ("lm_head.weight",), keep),
        (LAYER + r"norm\.weight", (r"model.layers.\1.input_layernorm.weight",), keep),
        (LAYER + r"mixer\.in_proj\.weight", tuple(f"{MIXER}{x}_proj.weight" for x in "gvkqa"), _projection),
        (LAYER + r"mixer\.conv1d\.(weight|bias)", tuple(name + r"\2" for name in CONV), _convolution),
        (LAYER + r"mixer\.dt_bias", (MIXER + "a_bias.bias",), keep),
        (LAYER + r"mixer\.A_log", (MIXER + "memory.A_log.bias",), keep),
        (LAYER + r"mixer\.D", (MIXER + "skip.bias",), keep),
        (LAYER + r"mixer\.norm\.weight", (MIXER + "o_norm.weight",), keep),
        (LAYER + r"mixer\.out_proj\.weight", (MIXER + "o_proj.weight",), keep),
    ),
)
