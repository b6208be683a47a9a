# Copyright 2026 the mc-transformers authors.
"""Mamba-2, in the layout of Transformers and in that of its authors (state-spaces), to `gated_linear` with step gates.

The projection's rows are [z, x, B, C, dt]: output gate, values, keys, queries, step sizes.
"""

import torch

from ..source import Source, keep, refuse


def _heads(found: dict) -> int:
    return found["num_heads"]


# defaults of the authors' layer, and values that change no logits
LAYER_DEFAULTS = {"d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1}
INITIAL = (
    "A_init_range",
    "dt_min",
    "dt_max",
    "dt_init_floor",
    "conv_init",
    "chunk_size",
    "use_mem_eff_path",
    "layer_idx",
)
# what else the authors' config may say, and the only values that Transformers' Mamba-2 has
LAYER_FIXED = {
    "layer": ("Mamba2",),
    "d_ssm": (None,),
    "D_has_hdim": (False,),
    "rmsnorm": (True,),
    "norm_before_gate": (False,),
    "conv_bias": (True, False),
    "bias": (False,),
    "dt_limit": ([0.0, float("inf")],),
}
MODEL_FIXED = {"rms_norm": (True,), "d_intermediate": (0,), "attn_layer_idx": ([], None)}


def in_terms_of_transformers(found: dict) -> dict:
    """config.json of the authors' package under the names of Transformers; every other config as it is.

    Raises:
        ValueError: another layer than Mamba-2, or an option that Transformers' Mamba-2 does not have.
    """
    if "ssm_cfg" not in found or "model_type" in found:
        return found
    layer = {"layer": "Mamba1", **found["ssm_cfg"]}  # their default
    known = {**LAYER_DEFAULTS, **LAYER_FIXED, **dict.fromkeys(INITIAL)}
    if unknown := sorted(set(layer) - set(known)):
        refuse(f"an unknown option of the layer (ssm_cfg.{unknown[0]})", layer[unknown[0]], ", ".join(known))
    for values, fixed, where in ((layer, LAYER_FIXED, "ssm_cfg."), (found, MODEL_FIXED, "")):
        for name, allowed in fixed.items():
            if name in values and values[name] not in allowed:
                refuse(f"another {where}{name}", values[name], " or ".join(map(repr, allowed)))
    layer = LAYER_DEFAULTS | layer
    padding, tied = found.get("pad_vocab_size_multiple", 8), found.get("tie_embeddings", True)
    return {
        "model_type": "mamba2",
        "architectures": found.get("architectures"),
        "vocab_size": -(-found["vocab_size"] // padding) * padding,
        "hidden_size": found["d_model"],
        "num_hidden_layers": found["n_layer"],
        "num_heads": layer["expand"] * found["d_model"] // layer["headdim"],
        "head_dim": layer["headdim"],
        "state_size": layer["d_state"],
        "n_groups": layer["ngroups"],
        "expand": layer["expand"],
        "conv_kernel": layer["d_conv"],
        "use_conv_bias": layer.get("conv_bias", True),
        "tie_word_embeddings": tied,
        "layer_norm_epsilon": 1e-5,
        **{name: found.get(name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")},
    }


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
    translate=in_terms_of_transformers,
    names={r"^backbone\.embedding\.": "backbone.embeddings."},
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
