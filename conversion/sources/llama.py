# Copyright 2026 the mc-transformers authors.
"""Llama, Qwen2 and Qwen3 to hybrids: attention layers stay as they are, chosen ones become memory layers (`--layers`).

A memory layer keeps the projections of q, k, v and o and the MLP; keys and values that several heads share are
repeated. What a memory has beyond that (gates, decay rates, norms of heads) starts as in a new model. Unlike every
other conversion the result is approximate where layers were chosen, and needs training: examples/linearize.py shows
how, from a small Llama.

Qwen2 has biases in the projections of q, k and v and none behind them: in attention layers, which have both or
neither, that of the output starts at zero.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from ...configuration_mc import LAYER_TYPE
from ..source import Source, keep, refuse


SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def _is_qwen2(found: dict) -> bool:
    return found["model_type"] == "qwen2"


def make_config(found: dict) -> dict:
    if found.get("hidden_act", "silu") != "silu":
        refuse("another activation (hidden_act)", found["hidden_act"], "'silu'")
    layer_types = found.get("layer_types") or ["full_attention"] * found["num_hidden_layers"]
    if set(layer_types) != {"full_attention"}:
        refuse("attention layers of another kind (layer_types)", sorted(set(layer_types)), "full_attention")
    biases = {"attention": "llama", "attention_bias": True} if _is_qwen2(found) else {"attention": found["model_type"]}
    return (
        {name: found[name] for name in SAME if name in found}
        | biases
        | {
            "head_dim": found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"],
            "layer_types": layer_types,
            "memory": "gated_linear",
            "conv_kernel_size": 0,
            "use_output_gate": False,
        }
    )


def _bias_targets(match: re.Match, found: dict) -> list[str]:
    """The bias of queries, and in Qwen2, which has no other, also that of the output."""
    names = ["q", "o"] if _is_qwen2(found) else ["q"]
    return [f"{match[1]}self_attn.{name}_proj.bias" for name in names]


def _bias(tensor: torch.Tensor, found: dict) -> list[torch.Tensor]:
    return [tensor, tensor.new_zeros(found["hidden_size"])] if _is_qwen2(found) else [tensor]


def repeat_heads(tensor: torch.Tensor, found: dict) -> tuple[torch.Tensor]:
    """Rows of keys or values, once per head."""
    heads, shared = found["num_attention_heads"], found["num_key_value_heads"]
    return (tensor.unflatten(0, (shared, -1)).repeat_interleave(heads // shared, 0).flatten(0, 1),)


def with_memory_layers(layers: Sequence[int]) -> Source:
    """The same, with the layers of these numbers as memory layers."""

    def make_hybrid_config(found: dict) -> dict:
        fields = make_config(found)
        if bad := [layer for layer in layers if not 0 <= layer < found["num_hidden_layers"]]:
            raise ValueError(f"layers={bad} do not exist, allowed: 0 to {found['num_hidden_layers'] - 1}")
        if found.get("attention_bias"):
            refuse("a bias of the output, which a memory layer would have to keep (attention_bias)", True, "False")
        kinds = [LAYER_TYPE if i in layers else kind for i, kind in enumerate(fields["layer_types"])]
        return fields | {"layer_types": kinds, "qkv_bias": _is_qwen2(found)}

    chosen, mixer = rf"model\.layers\.({'|'.join(map(str, layers))})\.self_attn\.", r"model.layers.\1.mixer."
    rules = (
        (chosen + r"([qo])_proj\.(weight|bias)", (mixer + r"\2_proj.\3",), keep),
        (chosen + r"([kv])_proj\.(weight|bias)", (mixer + r"\2_proj.\3",), repeat_heads),
        (chosen + r"[qk]_norm\.weight", (), keep),  # queries and keys of memory layers have length one
    )
    return replace(SOURCE, make_config=make_hybrid_config, rules=rules + SOURCE.rules, fresh=True)


LAYER = r"model\.layers\.\d+\."
PARTS = r"(?:self_attn|mlp)\.\w+\.(?:weight|bias)|(?:input|post_attention)_layernorm\.weight"
SOURCE = Source(
    name="llama",
    aliases=("qwen",),
    model_types=("llama", "qwen2", "qwen3"),
    make_config=make_config,
    with_memory_layers=with_memory_layers,
    rules=(
        (LAYER + r"self_attn\.rotary_emb\.inv_freq", (), keep),  # old files have these constants
        (rf"({LAYER})self_attn\.q_proj\.bias", _bias_targets, _bias),
        (rf"({LAYER}(?:{PARTS})|(?:model\.embed_tokens|model\.norm|lm_head)\.weight)", (r"\1",), keep),
    ),
)
