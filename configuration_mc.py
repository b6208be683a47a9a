# Copyright 2026 the mc-transformers authors.
"""MCConfig: every knob of the Memory Caching family."""

import difflib
import json
from pathlib import Path

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from .modeling_mc.limits import CHOICES as CHOICES
from .modeling_mc.limits import LARGEST as LARGEST
from .modeling_mc.limits import POSITIVE as POSITIVE
from .modeling_mc.limits import check_borders, check_values
from .modeling_mc.memories import MEMORIES


logger = logging.get_logger(__name__)

LAYER_TYPE = "memory_caching"
LAYER_TYPES = (LAYER_TYPE, "full_attention", "sliding_attention")
# What `layer_types` is called in a config.json. Where this class is not known Transformers reads the file as a bare
# `PreTrainedConfig`, to find the tokenizer for example, and that refuses `layer_types` which are not on its own list.
LAYER_TYPES_IN_FILES = "mc_layer_types"
LONGEST_VALUE = 200  # characters of a value in a message
PRESETS = Path(__file__).parent / "model_cards" / "presets"


def _short(value: object) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} ... ({len(text)} characters)"


def _value_errors(cls):
    """Let a wrong type raise the same kind of error as a wrong value: `strict` has an error class of its own."""
    strict_setattr = cls.__setattr__

    def __setattr__(self, name, value):
        try:
            strict_setattr(self, name, value)
        except StrictDataclassFieldValidationError as error:
            expected = cls.__annotations__.get(name, "another type")
            expected = getattr(expected, "__name__", str(expected))
            raise ValueError(f"MCConfig: `{name}`={_short(value)} has the wrong type, allowed: {expected}") from error

    cls.__setattr__ = __setattr__
    return cls


@_value_errors
@strict
class MCConfig(PreTrainedConfig):
    r"""
    Configuration of a Memory Caching decoder (arXiv 2602.24281).

    Args:
        vocab_size (`int`, defaults to `32000`): size of the vocabulary.
        hidden_size (`int`, defaults to `768`): width of the residual stream.
        intermediate_size (`int`, defaults to `2048`): width of the SwiGLU MLP; 0 = blocks without an MLP.
        num_hidden_layers (`int`, defaults to `12`): number of blocks.
        num_attention_heads (`int`, defaults to `12`): heads of every mixer.
        num_key_value_heads (`int`, *optional*): key and value heads of attention layers; defaults to
            `num_attention_heads`.
        head_dim (`int`, *optional*): width of queries and keys of a head; defaults to hidden_size / heads.
        num_memory_heads (`int`, *optional*): heads, each with a memory of its own, of memory layers; defaults to
            `num_attention_heads`.
        num_key_heads (`int`, *optional*): heads of queries and keys of memory layers, each shared by as many
            neighbouring memories; defaults to one per memory.
        key_head_dim (`int`, *optional*): width of queries and keys in memory layers; defaults to `head_dim`.
        value_head_dim (`int`, *optional*): width of values of a head in memory layers; defaults to `key_head_dim`.
        hidden_act (`str`, defaults to `"silu"`): activation of the MLP.
        max_position_embeddings (`int`, defaults to `4096`): longest sequence the model was made for; memory layers
            have no limit.
        initializer_range (`float`, defaults to `0.02`): standard deviation of initial weights.
        rms_norm_eps (`float`, defaults to `1e-06`): epsilon of the RMS norms.
        use_cache (`bool`, defaults to `True`): whether forward returns a cache by default.
        tie_word_embeddings (`bool`, defaults to `False`): whether the output head shares the embedding's weight.
        pad_token_id (`int`, *optional*): padding token.
        bos_token_id (`int`, *optional*): first token of a text.
        eos_token_id (`int` or `list[int]`, *optional*): tokens that end a text.
        layer_types (`list[str]`, *optional*): per layer "memory_caching" (default for all), "full_attention" or
            "sliding_attention".
        rope_parameters (`dict`, *optional*): rotary embedding of attention layers.
        sliding_window (`int`, *optional*): window of "sliding_attention" layers.
        attention_bias (`bool`, defaults to `False`): biases in the projections of attention layers.
        attention_dropout (`float`, defaults to `0.0`): dropout of attention weights.
        mlp_bias (`bool`, defaults to `False`): biases in the MLP.
        memory (`str`, defaults to `"linear"`): the write rule: "linear", "retention", "gated_linear", "swla",
            "gated_delta", "rwkv7", "dla", "titans", "lstm" or "gru".
        aggregation (`str`, defaults to `"grm"`): the read rule: "none" (plain RNN: one endless segment, `state_init`
            is ignored), "residual" (eq. 7), "grm" (eq. 9), "soup" (eq. 15), "ssc" (eq. 17) or "mean" (post-training
            caching).
        segmentation (`str`, defaults to `"constant"`): "constant", "logarithmic" (Fenwick grouping of the prefix in
            units of segment_size), or "content" (the text chooses, each row for itself; see `BorderRule`).
        segment_size (`int`, defaults to `256`): tokens per segment; with "content" the most that one can have.
        border_rule (`str`, defaults to `"dissimilarity"`): which token ends a segment of "content": one unlike the
            token before it ("dissimilarity"), or the one with which what was written comes to a "budget".
        border_budget (`float`, defaults to `32.0`): of "budget": strength times error, summed over a segment.
        least_segment_size (`int`, *optional*): of "content": the fewest tokens of a segment; defaults to a quarter of
            segment_size.
        mean_segment_size (`float`, *optional*): of "content": tokens per segment that the rate loss works for;
            defaults to the middle of least and most.
        border_loss_weight (`float`, defaults to `0.03`): of "content": what the rate loss is multiplied with before it
            is added to the loss of the labels, in training.
        state_init (`str`, defaults to `"independent"`): "independent" (a segment starts from M_0) or "checkpoint"
            (from the last state).
        trained_as (`str`, *optional*): the read rule of the training, where `read_as` has set another one since.
        online_memory (`str`, defaults to `"segment"`): whose answer is the online one, M_t(q_t) of eq. 9: "segment",
            the memory of the unfinished segment, as in the paper; or "running", a second memory that never starts
            anew, which is all that a model with aggregation="none" has. The finished segments are those of memories
            that started from M_0, either way.
        online_gate_bias (`float`, *optional*): a learned number per head, which starts at this value, is added to the
            online memory's logit; None = nothing is. A large one starts the model close to its online memory alone.
        cached_answers (`str`, defaults to `"mixed"`): "mixed": one set of gates weighs online and cached answers
            (eq. 9); or "added": y_t = M_t(q_t) + f * (cached answers), whose gates are made among finished segments
            alone, f a learned number per head. With f = 0 the model is its online memory.
        cached_answers_start (`float`, defaults to `0.0`): value of f at the start.
        num_selected_segments (`int`, defaults to `4`): k of "ssc".
        route_sharing (`str`, defaults to `"layer"`): "layer": every layer chooses its segments, or "model": all use
            the first memory layer's choice ("ssc").
        gate_source (`str`, defaults to `"projection"`): "projection" (u_t = x_t W_u) or "query" (u_t = q_t).
        gate_function (`str`, defaults to `"softmax"`): "softmax" over the memories read, the online one included;
            "sigmoid", each gate on its own; or "relu": positive logits divided by their sum, so that most gates can
            be zero (the online memory answers alone where no logit is positive).
        segment_summary (`str`, defaults to `"keys"`): what the segment descriptor averages: "keys" as written,
            "hidden" (the mixer's input, cut into heads), or "position" (sines and cosines of the tokens' positions:
            a gate without segment context, the ablation of the paper's Table 5; for keys of even width).
        summaries_per_segment (`int`, defaults to `1`): m > 1: one mean per sub-block of a segment, its score is the
            largest.
        memory_chunk_size (`int`, defaults to `16`): inner chunk of deep memories, the same in training and decoding.
        memory_expansion (`int`, defaults to `4`): hidden width of a deep memory / head_dim.
        memory_decay (`bool`, defaults to `False`): a learned decay of "dla" memories (which eq. 30 does not have).
        memory_head_norm (`bool`, defaults to `True`): M(x) = x + LN(W1 gelu(W2 x)) (True) or x + W1 gelu(W2 x).
        vector_read (`str`, defaults to `"multiply"`): how a vector memory ("lstm", "gru") is read: "multiply" (q * h,
            eq. 18-20) or "add" (y_t = h_t + sum of cached h_i under elementwise gates sigmoid(W [h_t, h_i] + b)); with
            "ssc", "add_weighted" weighs what was chosen by eq. 9 as well, so that the choice learns.
        allow_negative_eigenvalues (`bool`, defaults to `False`): write strengths of "gated_delta" in [0, 2] and not in
            [0, 1].
        conv_kernel_size (`int`, defaults to `4`): width of the causal depthwise convolution (with SiLU) on q, k and v;
            0 = none.
        conv_bias (`bool`, defaults to `False`): bias of this convolution.
        qkv_bias (`bool`, defaults to `False`): biases in the projections of q, k and v of memory layers.
        qk_norm (`bool`, defaults to `True`): L2 norm of queries and keys.
        qk_norm_eps (`float`, *optional*): divide by sqrt(|x|^2 + eps) instead of |x|.
        gate_form (`str`, defaults to `"sigmoid"`): of "gated_linear": "sigmoid" (a decay per head and token) or "step"
            (Mamba-2's step size, which decays and scales the write).
        value_skip (`bool`, defaults to `False`): add a learned multiple of a token's own value to each head's answer
            (Mamba-2's D).
        use_output_gate (`bool`, defaults to `True`): gate of the mixer's output.
        output_norm (`str`, defaults to `"head"`): "head" (RMS norm of each head, then the gate), "gated" (the gate,
            then one RMS norm over the heads that share a key head: Mamba-2) or "none".
        output_norm_eps (`float`, *optional*): its epsilon; defaults to `rms_norm_eps`.
        rope (`str`, defaults to `"attention"`): which layers have rotary positions: "attention", "all"
            (also q and k of memory layers) or "none".
        attention (`str`, defaults to `"llama"`): kind of the attention layers: "llama", "qwen3" (norms of q and
            k), "olmo_hybrid" (the same; the only one that can do without rotary positions) or "qwen3_next"
            (gated, partial rotary).
        attention_norm (`str`, defaults to `"pre"`): norms of attention blocks "pre" (before attention and MLP) or
            "post" (after them).
        max_cached_segments (`int`, *optional*): bound of the cache; None = no bound.
        cache_eviction (`str`, defaults to `"oldest"`): which segment leaves a full cache: "oldest" or "least_read".
        mc_backend (`str`, defaults to `"auto"`): "auto" (torch, until the Triton kernels have run on a GPU), "triton"
            (an error where it is not available), "torch" or "reference" (token by token, slow: the specification).

    Raises:
        ValueError: a value of the wrong type or out of range, or a combination that means nothing. The message names
            the field, the value and what is allowed.

    Example:
        >>> config = MCConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, memory="swla")
        >>> config.head_dim, config.aggregation, config.layer_types
        (32, 'grm', ['memory_caching', 'memory_caching'])
    """

    model_type = "mc"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "border_loss"]
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    num_memory_heads: int | None = None
    num_key_heads: int | None = None
    key_head_dim: int | None = None
    value_head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    layer_types: list[str] | None = None
    rope_parameters: dict | None = None
    sliding_window: int | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    memory: str = "linear"
    aggregation: str = "grm"
    segmentation: str = "constant"
    segment_size: int = 256
    border_rule: str = "dissimilarity"
    border_budget: float | int = 32.0
    least_segment_size: int | None = None
    mean_segment_size: float | int | None = None
    border_loss_weight: float | int = 0.03
    state_init: str = "independent"
    trained_as: str | None = None
    online_memory: str = "segment"
    online_gate_bias: float | int | None = None
    cached_answers: str = "mixed"
    cached_answers_start: float | int = 0.0
    num_selected_segments: int = 4
    route_sharing: str = "layer"
    gate_source: str = "projection"
    gate_function: str = "softmax"
    segment_summary: str = "keys"
    summaries_per_segment: int = 1
    memory_chunk_size: int = 16
    memory_expansion: int = 4
    memory_decay: bool = False
    memory_head_norm: bool = True
    vector_read: str = "multiply"
    allow_negative_eigenvalues: bool = False
    conv_kernel_size: int = 4
    conv_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = True
    qk_norm_eps: float | None = None
    gate_form: str = "sigmoid"
    value_skip: bool = False
    use_output_gate: bool = True
    output_norm: str = "head"
    output_norm_eps: float | None = None
    rope: str = "attention"
    attention: str = "llama"
    attention_norm: str = "pre"
    max_cached_segments: int | None = None
    cache_eviction: str = "oldest"
    mc_backend: str = "auto"

    def __post_init__(self, **kwargs):
        from_file = kwargs.pop(LAYER_TYPES_IN_FILES, None)
        if self.layer_types is None:
            self.layer_types = from_file
        self._hint_at_misspellings(kwargs)
        check_values(self)
        self._derive()
        self._check_combinations()
        self.base_model_tp_plan = self._tensor_parallel_plan()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Check all values once more: a model does, since `from_pretrained(folder, field=value)` sets them by name.

        Raises:
            ValueError: as when the config was made.
        """
        check_values(self)
        self._derive()
        self.convert_rope_params_to_dict()
        self._check_combinations()
        self.validate_rope()
        # older Transformers has put tied embeddings into the plan
        others = {name: style for name, style in self.base_model_tp_plan.items() if not name.startswith("layers.")}
        self.base_model_tp_plan = others | self._tensor_parallel_plan()

    def _derive(self) -> None:
        """Fields that follow from others where they are None."""
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                heads = self.num_attention_heads
                self.refuse("hidden_size", f"a multiple of num_attention_heads={heads} (or set head_dim)")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = [LAYER_TYPE] * self.num_hidden_layers
        if self.segmentation == "content":
            self.least_segment_size = self.least_segment_size or max(1, self.segment_size // 4)
            self.mean_segment_size = self.mean_segment_size or (self.least_segment_size + self.segment_size) / 2

    def refuse(self, field: str, allowed: str) -> None:
        """Raise the error for a field whose value is not allowed.

        Args:
            allowed: what is allowed, in words.

        Raises:
            ValueError: always; it names the field, its value and what is allowed.
        """
        raise ValueError(f"MCConfig: `{field}`={_short(getattr(self, field))} is not valid, allowed: {allowed}")

    def _hint_at_misspellings(self, unknown: dict) -> None:
        """Transformers keeps names that are not fields as attributes, so they can't be errors."""
        for name in unknown:
            near = difflib.get_close_matches(name, self.__dataclass_fields__, 1, 0.8)
            known = name.endswith("_token_id") or hasattr(type(self), name)  # of which Transformers knows more
            if near and not known:
                logger.warning_once(f"MCConfig: `{name}` is not a field and has no effect; is `{near[0]}` meant?")

    def _check_combinations(self) -> None:
        if len(self.layer_types) != self.num_hidden_layers or not set(self.layer_types) <= set(LAYER_TYPES):
            self.refuse("layer_types", f"num_hidden_layers={self.num_hidden_layers} entries out of {LAYER_TYPES}")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            self.refuse("sliding_window", "an integer >= 1 when layer_types has 'sliding_attention'")
        if self.max_cached_segments is not None and self.segmentation == "logarithmic":
            self.refuse("max_cached_segments", "None with segmentation='logarithmic', which bounds its cache itself")
        if self.route_sharing == "model" and (self.aggregation != "ssc" or self.max_cached_segments is not None):
            self.refuse("route_sharing", "'layer' unless aggregation='ssc' and max_cached_segments=None")
        if self.num_attention_heads % self.num_key_value_heads:
            self.refuse("num_key_value_heads", f"a divisor of num_attention_heads={self.num_attention_heads}")
        if self.segment_size % self.summaries_per_segment:
            self.refuse("summaries_per_segment", f"a divisor of segment_size={self.segment_size}")
        if self.memory_heads % self.memory_key_heads:
            self.refuse("num_key_heads", f"a divisor of the {self.memory_heads} heads of memory layers")
        if self.conv_bias and not self.conv_kernel_size:
            self.refuse("conv_bias", "False without a convolution (conv_kernel_size=0)")
        check_borders(self)
        self._check_memory()
        self._check_gates()
        self._check_rope()
        if self.segment_summary == "position" and self.memory_key_dim % 2:
            self.refuse("segment_summary", f"'keys' or 'hidden' with keys of odd width {self.memory_key_dim}")
        if self.segment_summary == "hidden":
            if self.hidden_size % self.memory_heads:
                self.refuse("segment_summary", "'keys' unless hidden_size is a multiple of the heads")
            if self.gate_source == "query" and self.memory_key_dim * self.memory_heads != self.hidden_size:
                self.refuse("gate_source", "'projection' when segment_summary='hidden' and head_dim * heads differs")

    def _check_memory(self) -> None:
        if self.memory not in MEMORIES:
            self.refuse("memory", ", ".join(repr(name) for name in MEMORIES))
        memory = MEMORIES[self.memory]
        for field in {field for other in MEMORIES.values() for field in other.own_fields} - {*memory.own_fields}:
            default = self.__dataclass_fields__[field].default
            if getattr(self, field) != default:
                self.refuse(field, f"{default!r} with memory={self.memory!r}")
        if self.mc_backend == "triton" and not memory.has_triton:
            self.refuse("mc_backend", f"'auto', 'torch' or 'reference' with memory={self.memory!r}")
        memory.check(self)

    def _check_gates(self) -> None:
        if self.online_memory == "running" and (self.aggregation == "none" or self.state_init == "checkpoint"):
            self.refuse(
                "online_memory", "'segment' with aggregation='none' or state_init='checkpoint', which are running"
            )
        if self.cached_answers == "added":
            if self.aggregation not in ("residual", "grm", "ssc"):
                self.refuse("cached_answers", "'mixed' unless aggregation is 'residual', 'grm' or 'ssc'")
            if self.online_gate_bias is not None:
                self.refuse(
                    "online_gate_bias", "None with cached_answers='added', where the online answer has no gate"
                )
        if self.online_gate_bias is not None and self.aggregation not in ("grm", "soup", "ssc"):
            self.refuse("online_gate_bias", "None unless aggregation is 'grm', 'soup' or 'ssc'")
        from .kernels.read.gates import CONSTANT, GATE_FUNCTIONS  # here, as the memories above

        known = {name: function for name, function in GATE_FUNCTIONS.items() if name != CONSTANT}
        if self.mc_backend == "triton":
            known = {name: function for name, function in known.items() if function.triton}
        if self.gate_function not in known:
            where = " with mc_backend='triton'" if self.mc_backend == "triton" else ""
            self.refuse("gate_function", ", ".join(map(repr, known)) + where)

    @property
    def _turns_attention(self) -> bool:
        """Whether there are attention layers with rotary positions."""
        return self.rope != "none" and set(self.layer_types) != {LAYER_TYPE}

    def _check_rope(self) -> None:
        has_attention = set(self.layer_types) != {LAYER_TYPE}
        if self._turns_attention and self.head_dim % 2:
            self.refuse("head_dim", "an even width with rotary positions in attention layers")
        if self.rope == "none" and has_attention and self.attention != "olmo_hybrid":
            self.refuse("rope", f"'attention' or 'all' with attention={self.attention!r}")
        found = self.rope_parameters or {}
        kind, theta = found.get("rope_type", found.get("type", "default")), found.get("rope_theta", self.default_theta)
        kinds = ("default", *ROPE_INIT_FUNCTIONS)
        if set(found) & set(LAYER_TYPES) or kind not in kinds or not (isinstance(theta, int | float) and theta > 0):
            self.refuse("rope_parameters", f"one dictionary for all layers, rope_theta > 0, rope_type out of {kinds}")
        if self.rope == "all":
            if kind != "default" or self.memory_key_dim % 2:
                self.refuse("rope", "'attention' unless rope_type is 'default' and the width of keys is even")

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Every projection is split over the ranks and its outputs are gathered, for any number of ranks; where heads
        divide, `modeling_mc.tensor_parallel` splits memory layers by heads instead."""
        names = []
        if LAYER_TYPE in self.layer_types:
            own_gates = self.vector_read != "multiply" and self.aggregation != "ssc"
            gated = self.aggregation in ("grm", "soup", "ssc") and self.gate_source == "projection" and not own_gates
            optional = ["u"] * gated + ["g"] * self.use_output_gate
            asks = self.vector_read == "multiply" or (self.aggregation == "ssc" and self.gate_source == "query")
            names += [f"mixer.{name}_proj" for name in (*["q"] * asks, "k", "v", "o", *optional)]
        if set(self.layer_types) != {LAYER_TYPE}:
            names += [f"self_attn.{name}_proj" for name in "qkvo"]
        plan = {f"layers.*.{name}": "colwise_gather_output" for name in names}
        if self.intermediate_size:
            plan |= {f"layers.*.mlp.{name}_proj": "colwise" for name in ("gate", "up")}
            plan["layers.*.mlp.down_proj"] = "rowwise"
        return plan

    def to_json_string(self, use_diff: bool = True) -> str:
        """The config as it stands in config.json, where `layer_types` is called `mc_layer_types` (`to_dict` and the
        attribute keep the usual name; files with the usual name are read too)."""
        fields = json.loads(super().to_json_string(use_diff))
        fields = {LAYER_TYPES_IN_FILES if name == "layer_types" else name: value for name, value in fields.items()}
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    def validate_layer_type(self):
        """Transformers' list of layer types does not know ours; `_check_combinations` has already looked."""

    def validate_rope(self):
        """Transformers' look at rotary positions, for attention layers that have some: heads may be of odd width."""
        if self._turns_attention:
            super().validate_rope()

    @property
    def memory_heads(self) -> int:
        """Heads of memory layers."""
        return self.num_memory_heads or self.num_attention_heads

    @property
    def memory_key_heads(self) -> int:
        """Heads of queries and keys in memory layers."""
        return self.num_key_heads or self.memory_heads

    @property
    def memory_key_dim(self) -> int:
        """Width of queries and keys of a head in memory layers."""
        return self.key_head_dim or self.head_dim

    @property
    def memory_value_dim(self) -> int:
        """Width of values of a head in memory layers."""
        return self.value_head_dim or self.memory_key_dim

    @property
    def summary_dim(self) -> int:
        """Width per head of a segment descriptor and of u_t."""
        return self.hidden_size // self.memory_heads if self.segment_summary == "hidden" else self.memory_key_dim

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "MCConfig":
        """Config of a published size: "mc-170m", "mc-340m", "mc-760m" or "mc-1.3b" (the paper's Table 6), of
        "log-linear++" (GRM gates over logarithmic segments, section 5), or "anchored": a read that starts as the
        model without caching (not of the paper; sizes are the defaults).

        Raises:
            ValueError: no preset of that name.
        """
        known = sorted(path.stem for path in PRESETS.glob("*.json"))
        if name not in known:
            raise ValueError(f"MCConfig.from_preset: `name`={name!r} is not known, allowed: {', '.join(known)}")
        return cls(**{**json.loads((PRESETS / f"{name}.json").read_text()), **overrides})


__all__ = ["MCConfig"]
