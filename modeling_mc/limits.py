# Copyright 2026 the mc-transformers authors.
"""Which values the fields of MCConfig may have: choices, counts from 1, and what no model is larger than."""

from transformers.activations import ACT2FN


CHOICES = {
    "aggregation": ("none", "residual", "grm", "soup", "ssc", "mean"),
    "segmentation": ("constant", "logarithmic", "content"),
    "border_rule": ("dissimilarity", "budget"),
    "state_init": ("independent", "checkpoint"),
    "online_memory": ("segment", "running"),
    "cached_answers": ("mixed", "added"),
    "vector_read": ("multiply", "add", "add_weighted"),
    "gate_source": ("projection", "query"),
    "segment_summary": ("keys", "hidden", "position"),
    "cache_eviction": ("oldest", "least_read"),
    "route_sharing": ("layer", "model"),
    "gate_form": ("sigmoid", "step"),
    "output_norm": ("head", "gated", "none"),
    "rope": ("attention", "all", "none"),
    "attention": ("llama", "qwen3", "olmo_hybrid", "qwen3_next"),
    "attention_norm": ("pre", "post"),
    "mc_backend": ("auto", "triton", "torch", "reference"),
}
POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_memory_heads",
    "num_key_heads",
    "key_head_dim",
    "value_head_dim",
    "max_position_embeddings",
    "segment_size",
    "least_segment_size",
    "num_selected_segments",
    "summaries_per_segment",
    "memory_chunk_size",
    "memory_expansion",
    "sliding_window",
    "max_cached_segments",
)
# Far above any model, and low enough that what a damaged file asks for is refused before anything is built of it.
LARGEST = {
    "num_hidden_layers": 2**10,
    "summaries_per_segment": 2**12,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "num_memory_heads": 2**14,
    "num_key_heads": 2**14,
    "head_dim": 2**14,
    "key_head_dim": 2**14,
    "value_head_dim": 2**14,
    "hidden_size": 2**18,
    "intermediate_size": 2**22,
    "vocab_size": 2**26,
    "conv_kernel_size": 2**10,
    "memory_expansion": 2**10,
    "memory_chunk_size": 2**20,
    "segment_size": 2**48,
    "sliding_window": 2**48,
}
# of segmentation="content" alone
BORDER_FIELDS = ("border_rule", "border_budget", "least_segment_size", "mean_segment_size", "border_loss_weight")


def check_values(config) -> None:
    """Refuse, by `config.refuse`, values of an `MCConfig` that no other field makes right.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    for field, allowed in CHOICES.items():
        if getattr(config, field) not in allowed:
            config.refuse(field, ", ".join(repr(a) for a in allowed))
    for field in POSITIVE:
        if getattr(config, field) is not None and getattr(config, field) < 1:
            config.refuse(field, "an integer >= 1")
    for field, largest in LARGEST.items():
        if getattr(config, field) is not None and getattr(config, field) > largest:
            config.refuse(field, f"an integer <= {largest}")
    for field, meaning in (("conv_kernel_size", "convolution"), ("intermediate_size", "MLP")):
        if getattr(config, field) < 0:
            config.refuse(field, f"an integer >= 0 (0 = no {meaning})")
    for field in ("rms_norm_eps", "qk_norm_eps", "output_norm_eps"):
        if getattr(config, field) is not None and not 0 < getattr(config, field) < float("inf"):
            config.refuse(field, "a number > 0")
    if not 0 <= config.initializer_range < float("inf"):
        config.refuse("initializer_range", "a number >= 0")
    if config.pad_token_id is not None and not -config.vocab_size <= config.pad_token_id < config.vocab_size:
        config.refuse("pad_token_id", f"a token of vocab_size={config.vocab_size}, or None")
    if not 0 <= config.attention_dropout <= 1:
        config.refuse("attention_dropout", "a number from 0 to 1")
    if config.hidden_act not in ACT2FN:
        config.refuse("hidden_act", ", ".join(repr(name) for name in sorted(ACT2FN)))


def check_borders(config) -> None:
    """Refuse fields of borders that content chooses where it does not, or what does not go with it.

    Raises:
        ValueError: as `check_values`.
    """
    if config.segmentation != "content":
        for field in BORDER_FIELDS:
            if getattr(config, field) != (default := config.__dataclass_fields__[field].default):
                config.refuse(field, f"{default!r} unless segmentation='content'")
        return
    if config.aggregation == "none":
        config.refuse("segmentation", "'constant' or 'logarithmic' with aggregation='none', which keeps no segment")
    if config.cache_eviction == "least_read":
        config.refuse("cache_eviction", "'oldest' with segmentation='content'")
    least, most, mean = config.least_segment_size, config.segment_size, config.mean_segment_size
    if least > most:
        config.refuse("least_segment_size", f"an integer from 1 to segment_size={most}")
    if not (least <= mean <= most and mean > 1):
        config.refuse("mean_segment_size", f"a number > 1 from least_segment_size={least} to segment_size={most}")
    if not 0 < config.border_budget < float("inf"):
        config.refuse("border_budget", "a number > 0")
    if not 0 <= config.border_loss_weight < float("inf"):
        config.refuse("border_loss_weight", "a number >= 0")
